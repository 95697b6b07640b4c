"""Data sets compressed offline: a folder of shards with a prefix or a prompt for every document."""

from .reading import CompressedDocuments, open_prefixes, open_prompt_embeds, read_shard
from .running import compress_dataset
from .settings import BulkOptions

__all__ = [
    "BulkOptions",
    "CompressedDocuments",
    "compress_dataset",
    "open_prefixes",
    "open_prompt_embeds",
    "read_shard",
]
