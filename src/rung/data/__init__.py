"""From files to supervised tokens: read, recognise, split, render, tokenise, check. No torch here."""

from rung.data.cache import cached_examples
from rung.data.chat import Chat
from rung.data.splits import Splits, load_data
from rung.data.token_store import Tokenised
from rung.data.tokenize import Preflight

__all__ = ["Chat", "Preflight", "Splits", "Tokenised", "cached_examples", "load_data"]
