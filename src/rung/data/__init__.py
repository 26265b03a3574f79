"""Data: from files to supervised tokens (read, detect the format, split, render, tokenize, check).

Nothing here imports torch, which keeps `rung data check` and `rung plan` fast to start. Rows and tokens stay on disk
(decision 0011): memory does not grow with the data, at the price of disk space in the cache folder.
"""

from rung.data.cache import cached_examples
from rung.data.chat import ChatTemplate
from rung.data.splits import Splits, load_data
from rung.data.token_store import TokenizedDataset
from rung.data.tokenize import Preflight

__all__ = ["ChatTemplate", "Preflight", "Splits", "TokenizedDataset", "cached_examples", "load_data"]
