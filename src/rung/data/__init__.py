"""From files to supervised tokens: read, recognize, split, render, tokenize, check. No torch here."""

from rung.data.cache import cached_examples
from rung.data.chat import ChatTemplate
from rung.data.splits import Splits, load_data
from rung.data.token_store import TokenizedDataset
from rung.data.tokenize import Preflight

__all__ = ["ChatTemplate", "Preflight", "Splits", "TokenizedDataset", "cached_examples", "load_data"]
