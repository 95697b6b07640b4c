"""SemToken (arXiv 2508.15190) as drop-in Transformers classes."""

from .cache_semtoken import SemTokenCache
from .compression import CompressedPrompt
from .families import register_all
from .prefix_semtoken import CompressedPrefix
from .static_cache_semtoken import SemTokenStaticCache
from .tokenization_semtoken_fast import SemTokenFastTokenizer, SpanPlanner

_CLASSES = register_all()
globals().update(_CLASSES)


def convert_checkpoint(*args, **kwargs):
    """See `semtoken_hf.conversion.checkpoint.convert_checkpoint`."""
    from .conversion.checkpoint import convert_checkpoint as convert

    return convert(*args, **kwargs)


__all__ = [
    "CompressedPrefix",
    "CompressedPrompt",
    "SemTokenCache",
    "SemTokenFastTokenizer",
    "SemTokenStaticCache",
    "SpanPlanner",
    "convert_checkpoint",
    *_CLASSES,
]
