"""What a bench is asked to do: the options that decide its numbers."""

from __future__ import annotations

from dataclasses import dataclass

from coral.errors import CoralError
from coral.tree import TreeSize


@dataclass(frozen=True)
class BenchConfig:
    """Options of a bench. They are kept with its results; a bench goes on only with the same ones.

    limit: take only the first so many prompts of each suite.
    deepen: append layers that change no output up to this many, with FFNs that make a draft step cost
        `cost_ratio` of a plain step (see `deepen.deepen`).
    dtypes: "auto", "float32", "bfloat16", "float16"; each is measured against its own plain decoding.
    coupled: whether drafting shares the sampler's noise; each value gives a row at temperature > 0.
    max_new_tokens: a turn ends after so many tokens, or at the target's end token.
    tree_size: of all drafters; None: what `coral tune` found for each, else the built-in one.
    peers: also run Hugging Face's `generate` and prompt lookup, and our n-gram.
    assistant: a small causal LM of the target's vocabulary. Hugging Face's assisted generation with it
        becomes a peer.
    backend: what computes the target for our methods (see `Target.on`); plain decoding runs on transformers'
        code, too.
    head: the drafters' LM head, see `heads.load`.
    fallback: our drafters take plain steps while drafting is slower (see `Fallback`), which changes tau.
    ignore_eos: end tokens do not end a turn, so that all are of one length. What a target writes behind its
        end is unlike its other text, and drafts of it are worse.
    note: printed with every table, for example that the target's weights are random.
    """

    limit: int | None = None
    deepen: int | None = None
    cost_ratio: float = 0.10
    dtypes: tuple[str, ...] = ("auto",)
    temperatures: tuple[float, ...] = (0.0,)
    coupled: tuple[bool, ...] = (True,)
    max_new_tokens: int = 128
    tree_size: TreeSize | None = None
    peers: bool = True
    assistant: str | None = None
    backend: str = "auto"
    head: str = "auto"
    fallback: bool = False
    ignore_eos: bool = False
    seed: int = 0
    device: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.assistant is not None and not self.peers:
            raise CoralError(
                "an assistant makes a peer, but peers are left out; leave out one of the two options."
            )
        if self.max_new_tokens < 1:
            raise CoralError(f"max_new_tokens is {self.max_new_tokens}, but it must be at least 1.")
