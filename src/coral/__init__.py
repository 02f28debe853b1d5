"""CORAL: makes a Hugging Face LLM write faster without changing a word of its output.

import coral
llm = coral.load("path-or-hub-id", "drafter-directory")
print(llm.generate("What is a reef?"))
"""

import os
from typing import TYPE_CHECKING, Any

# How long a thread of a team spins before it sleeps; libgomp reads it when torch loads it. Its own default is
# many milliseconds, which a thread spends waiting for one that a busy neighbour keeps off its core.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# oneDNN, and torch's binding of it, keep the code made for each shape of a product: megabytes each,
# a thousand of them. Training's batches have a shape each, so memory would grow for hundreds
# of updates. Both are read at the first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")

if TYPE_CHECKING:
    from coral.api import LLM, load
    from coral.decoding.sampling import Sampling
    from coral.decoding.state import Cycle, State
    from coral.drafters.drafting import Drafting
    from coral.errors import CoralError
    from coral.integrations.transformers.hook import for_transformers
    from coral.target.target import Target
    from coral.tree import DraftTree, TreeSize

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "CoralError",
    "Cycle",
    "DraftTree",
    "Drafting",
    "Sampling",
    "State",
    "Target",
    "TreeSize",
    "for_transformers",
    "load",
]

_HOME = {
    "LLM": "coral.api",
    "load": "coral.api",
    "Sampling": "coral.decoding.sampling",
    "Cycle": "coral.decoding.state",
    "State": "coral.decoding.state",
    "TreeSize": "coral.tree",
    "DraftTree": "coral.tree",
    "Drafting": "coral.drafters.drafting",
    "CoralError": "coral.errors",
    "for_transformers": "coral.integrations.transformers.hook",
    "Target": "coral.target.target",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `coral --help` must not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'coral' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
