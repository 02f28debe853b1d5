"""The ways of writing that are compared; each is one function of prompt, sampling, sequence id and length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel

from coral.data.prepared import vocabulary_digest
from coral.decoding.cycle import Proposer, generate
from coral.decoding.fallback import Fallback
from coral.decoding.sampling import Sampling
from coral.decoding.state import Cycle, State
from coral.drafters.drafting import Drafting
from coral.errors import CoralError
from coral.target.target import Target
from coral.tree import TreeSize


@dataclass(frozen=True)
class Written:
    """What a method wrote.

    seconds: wall time from the prompt's ids to the last token, prefill included.
    prefill_seconds: its part before the first cycle (Hugging Face: up to the end of the first forward).
    cycles: one a target forward. Hugging Face reports none, there a hook on the target counts.
    """

    tokens: list[int]
    seconds: float
    prefill_seconds: float
    num_cycles: int
    cycles: list[Cycle]


class Write(Protocol):
    """Writes up to `length` tokens, or up to the first of `eos_ids`."""

    def __call__(
        self,
        prompt: list[int],
        sampling: Sampling,
        sequence_id: int,
        length: int,
        eos_ids: frozenset[int] = frozenset(),
    ) -> Written: ...


MakeProposer = Callable[[Target, bool], Proposer]
"""(target, coupled) -> proposer; a bench makes one for each dtype."""

# Names that no drafter may take; "plain" and "ngram" only where they are what they say.
RESERVED = ("plain", "hf_generate", "hf_prompt_lookup", "hf_assisted", "ngram")


def ours(target: Target, proposer: Proposer, tree_size: TreeSize) -> Write:
    """Our decoding with any proposer."""

    def write(
        prompt: list[int],
        sampling: Sampling,
        sequence_id: int,
        length: int,
        eos_ids: frozenset[int] = frozenset(),
    ) -> Written:
        begin = perf_counter()
        options = {"sampling": sampling, "sequence_id": sequence_id, "eos_ids": eos_ids}
        state = State.begin(target, prompt, length, tree_size.num_nodes, **options)
        cycles = [cycle for (cycle,) in generate(target, proposer, [state], tree_size)]
        seconds = perf_counter() - begin
        prefill = seconds - sum(cycle.seconds for cycle in cycles)
        return Written(state.written, seconds, prefill, len(cycles), cycles)

    return write


def hugging_face(target: Target, assistant: PreTrainedModel | None = None, **options: Any) -> Write:
    """`model.generate`, by default plain; `prompt_lookup_num_tokens=10` makes it prompt lookup, a draft model
    (see `load_assistant`) assisted generation.

    At temperature > 0 it draws from its own random numbers, so only its speed can be compared.
    """

    model: Any = target.model  # its type does not know `generate`

    def write(
        prompt: list[int],
        sampling: Sampling,
        sequence_id: int,
        length: int,
        eos_ids: frozenset[int] = frozenset(),
    ) -> Written:
        drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        # Where texts may end, `generate` wants a padding token; an assistant leaves it out of the prompt.
        config = GenerationConfig(
            max_new_tokens=length,
            eos_token_id=sorted(eos_ids) or None,
            pad_token_id=model.config.get_text_config().pad_token_id if eos_ids else None,
            do_sample=sampling.temperature > 0,
            **(drawn if sampling.temperature > 0 else {}),
            **options,
        )
        ends: list[float] = []
        hook = target.model.register_forward_hook(lambda *_: ends.append(perf_counter()))
        # The model's own defaults would fill what is left open here, the end token above all.
        defaults, target.model.generation_config = target.model.generation_config, GenerationConfig()
        torch.manual_seed((sampling.seed + sequence_id) % 2**63)
        try:
            begin = perf_counter()
            ids = torch.tensor([prompt], device=target.device)
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                assistant_model=assistant,
            )
            tokens = output[0, len(prompt) :].tolist()
            seconds = perf_counter() - begin
        finally:
            hook.remove()
            target.model.generation_config = defaults
        return Written(tokens, seconds, ends[0] - begin, len(ends), [])

    return write


def load_assistant(source: str | Path, target: Target) -> PreTrainedModel:
    """The draft model of assisted generation: any small causal LM of the target's vocabulary.

    It is loaded as the target is (dtype, device, attention, packed weights), so that it is as fast. It drafts
    by transformers' defaults: as long as it is confident, 20 tokens at most, and past end tokens.

    Raises:
        CoralError: it cannot be loaded, or has another vocabulary than the target.
    """
    try:
        loaded = Target.load(
            source, dtype=str(target.dtype).removeprefix("torch."), device=str(target.device)
        )
    except CoralError as error:
        raise CoralError(f"the assistant {source} cannot be used: {error}") from error
    sizes, tokenizers = {loaded.vocab_size, target.vocab_size}, (loaded.tokenizer, target.tokenizer)
    digests = {vocabulary_digest(tokenizer) for tokenizer in tokenizers if tokenizer is not None}
    if len(sizes) > 1 or len(digests) > 1:
        raise CoralError(
            f"the assistant {source} has another vocabulary ({loaded.vocab_size} ids) than the target "
            f"({target.vocab_size}); name a model with the target's tokenizer and number of ids."
        )
    loaded.model.generation_config = GenerationConfig()
    return loaded.model


@dataclass(frozen=True)
class Method:
    """A way of writing, with the name that its results carry."""

    kind: Literal["plain", "drafter", "peer"]
    name: str
    coupled: bool
    write: Write


@dataclass(frozen=True)
class Rivals:
    """Who is measured beside plain decoding.

    made, tree_sizes: of the drafters, by name. lookup: the n-gram peer's tree_size, unless it is one of them.
    assistant: the draft model of Hugging Face's assisted generation.
    """

    made: Mapping[str, MakeProposer]
    tree_sizes: Mapping[str, TreeSize]
    lookup: TreeSize
    assistant: PreTrainedModel | None = None

    @property
    def rows(self) -> set[int]:
        """Sizes of the trees that are verified, root included."""
        return {tree_size.num_nodes + 1 for tree_size in (self.lookup, *self.tree_sizes.values())}


def all_methods(
    target: Target, plain: Write, rivals: Rivals, coupled: Sequence[bool], peers: bool, fallback: bool = False
) -> list[Method]:
    """All methods, plain decoding first: the others are compared with what it wrote.

    Args:
        coupled: each drafter writes once for each of these.
    """
    made = rivals.made
    methods = [Method("plain", "plain", False, plain)]
    if peers:
        methods += [
            Method("peer", "hf_generate", False, hugging_face(target)),
            Method("peer", "hf_prompt_lookup", False, hugging_face(target, prompt_lookup_num_tokens=10)),
        ]
        if rivals.assistant is not None:
            methods.append(Method("peer", "hf_assisted", False, hugging_face(target, rivals.assistant)))
    if peers or "ngram" in made:
        lookup = rivals.tree_sizes.get("ngram", rivals.lookup)
        proposer = Drafting(lookup=True, fallback=fallback and "ngram" in made).proposer(target)
        found = ours(target.sized(lookup.num_nodes + 1), proposer, lookup)
        methods.append(Method("peer", "ngram", False, found))
    for name, make in made.items():
        if name == "ngram":
            continue  # measured above, once: it has no noise to share
        tree_size = rivals.tree_sizes[name]
        own = target.sized(tree_size.num_nodes + 1)
        for flag in coupled:
            proposer = make(own, flag)
            proposer = Fallback(proposer) if fallback else proposer
            methods.append(Method("drafter", name, flag, ours(own, proposer, tree_size)))
    return methods


def maker(source: Drafting | MakeProposer) -> MakeProposer:
    if not isinstance(source, Drafting):
        return source
    return lambda target, coupled: replace(source, coupled=coupled, fallback=False).proposer(target)
