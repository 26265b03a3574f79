"""From files to supervised tokens: read, recognise, split, render, tokenise, check. No torch here."""

from rung.data.cache import cached_examples
from rung.data.chat import Chat
from rung.data.flat import Tokenised
from rung.data.mix import load_data
from rung.data.split import Splits
from rung.data.tokenise import Preflight

__all__ = ["Chat", "Preflight", "Splits", "Tokenised", "cached_examples", "load_data"]
