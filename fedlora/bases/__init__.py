"""Registry of frozen bases and their cards. No torch."""

from fedlora.bases.card import BaseCard, read_card, write_card
from fedlora.bases.registry import (
    BaseInfo,
    base_kind,
    base_path,
    cache_home,
    list_bases,
    load_card,
    tokenizer_file,
)

__all__ = [
    "BaseCard",
    "BaseInfo",
    "base_kind",
    "base_path",
    "cache_home",
    "list_bases",
    "load_card",
    "read_card",
    "tokenizer_file",
    "write_card",
]
