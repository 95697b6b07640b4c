"""Every family of calls, by name."""

from .caches import CACHES
from .call_oracles import COMPRESS, FORWARD, GENERATE

FAMILIES = {"compress": COMPRESS, "forward": FORWARD, "generate": GENERATE, "caches": CACHES}
