"""Every family of calls, by name."""

from .caches import CACHES
from .call_oracles import COMPRESS, FORWARD, GENERATE
from .configurations import CONFIGURATIONS
from .files import FILES
from .texts import CHATS, TEXTS

FAMILIES = {
    "configurations": CONFIGURATIONS,
    "compress": COMPRESS,
    "forward": FORWARD,
    "generate": GENERATE,
    "caches": CACHES,
    "tokenizer": TEXTS,
    "chats": CHATS,
    "files": FILES,
}
