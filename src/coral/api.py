"""A target and a proposer, ready to write: what `coral.load` returns."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coral.data import chat_format
from coral.decoding import prompt_forms
from coral.decoding.cycle import Proposer, generate
from coral.decoding.prompt_forms import Prompt
from coral.decoding.sampling import Sampling
from coral.decoding.state import Cycle, State
from coral.decoding.text import Detokenizer, Stop, cut_at, stop_at, stop_strings
from coral.drafters.drafting import Drafting
from coral.errors import CoralError
from coral.serving.engine import Engine
from coral.target import default as models
from coral.target.native import why_not_native
from coral.target.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from coral.tree import TreeSize


def load(
    target: str | Path | PreTrainedModel | Target | None = None,
    drafter: Any = None,
    *,
    tree: TreeSize | None = None,
    head: str | None = "auto",
    coupled: bool = True,
    fallback: bool = True,
    backend: str = "auto",
    **loading: Any,
) -> LLM:
    """Load a target and what drafts for it.

    Args:
        target: directory, hub id, loaded model, or None for SmolLM2-135M-Instruct, which is fetched once, and
            the drafter that the package has for it.
        drafter: drafter directory or hub id ("me/drafter", pinned as "me/drafter@REVISION"), "ngram" (prompt
            lookup, no training), both in one tree as "DIRECTORY+ngram", a drafter that is already loaded,
            None for plain decoding, or a `Drafting`, which says the next four, too.
        tree, head, coupled, fallback: see `Drafting`.
        backend: see `Target.on`.
        loading: tokenizer, dtype, device, device_map, attention, revision, trust_remote_code: see
            `Target.load`. Without a target "auto" as dtype is what `default.load_to_write` says.

    Raises:
        CoralError: not found, not supported, or a drafter of another target.
    """
    if target is None and drafter is None:
        drafter = models.DRAFTER
    drafting = Drafting.parse(drafter, tree=tree, head=head, coupled=coupled, fallback=fallback).located()
    if target is None:
        own = {name: loading[name] for name in loading.keys() - {"revision", "trust_remote_code"}}
        target = models.load_to_write(**own)
    elif not isinstance(target, Target):
        target = Target.load(target, **loading)
    target = target.on(backend)
    size, origin = drafting.tree_size(target)
    if backend == "graphs":
        target = target.on(backend, (1, size.num_nodes + 1))
    slow = backend == "auto" and target.backend != "native" and target.device.type == "cpu"
    return LLM(target, drafting.proposer(target), size, origin, why_not_native(target) if slow else None)


class LLM:
    """A target and its proposer. The text never depends on the proposer, only the speed does.

    tree_size: how large draft trees grow; tree_size_origin: where it comes from, see `Drafting.tree_size`.
    why: why the target is not run natively on a CPU; None where it is, or another backend was asked for.
    """

    def __init__(
        self,
        target: Target,
        proposer: Proposer,
        tree_size: TreeSize,
        tree_size_origin: str = "asked for",
        why: str | None = None,
    ) -> None:
        self.target, self.proposer, self.tree_size = target, proposer, tree_size
        self.tree_size_origin, self.why = tree_size_origin, why

    def generate(self, prompt: Prompt | Sequence[str], **options: Any) -> Any:
        """The whole answer as text, special tokens and stop string left out; of several prompts a list of
        answers, of which as many are written at once as `serving.engine` takes. Options: see `start`.
        """
        several = isinstance(prompt, list | tuple) and {*map(type, prompt)} == {str}
        asked: Any = prompt if several else [prompt]
        first = options.pop("sequence_id", 0)
        states = [self.start(each, sequence_id=first + i, **options) for i, each in enumerate(asked)]
        if several:
            coming = iter(states)
            engine = Engine(self.target, self.proposer, self.tree_size)
            deque(engine.write(lambda: next(coming, None)), maxlen=0)
        else:
            deque(self.cycles(states[0]), maxlen=0)
        texts = [self._text(state.written, options.get("stop")) for state in states]
        return texts if several else texts[0]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Cycle]:
        """Write after `prompt`; yields a cycle for each target forward. Options: see `start`."""
        return self.cycles(self.start(prompt, **options))

    def _text(self, tokens: list[int], stop: Stop | None) -> str:
        detokenizer = Detokenizer(self.tokenizer)
        return cut_at("".join(map(detokenizer.push, tokens)) + detokenizer.rest(), stop)

    def start(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = 256,
        stop: Stop = (),
        chat: bool = True,
        ignore_eos: bool = False,
        sequence_id: int = 0,
        **drawn: float | None,
    ) -> State:
        """The state of a new text.

        Args:
            prompt: a question (or with chat=False a text to go on with), chat messages, or token ids, in any
                form that `prompt_forms.read` knows. Of the options, None is the default.
            max_new_tokens: the text also ends where the target's context does.
            stop: the text ends before this string, or any of these.
            drawn: temperature (0, which is greedy), top_k (0: all), top_p (1), seed (0); see `Sampling`. With
                one seed and sequence_id the text is the same, whatever the machine, batch or drafter.

        Raises:
            CoralError: an empty prompt, one longer than the context, or an option out of range.
        """
        prompt = prompt_forms.read(prompt)
        tokens = self.encode(prompt, chat)
        strings = stop_strings(stop)
        length = self._check_length(tokens, max_new_tokens)
        if not isinstance(sequence_id, Integral):
            raise CoralError(f"sequence_id is {sequence_id!r}, but it must be a whole number.")
        asked: dict[str, Any] = {name: value for name, value in drawn.items() if value is not None}
        return State.begin(
            self.target,
            tokens,
            length - len(tokens),
            self.tree_size.num_nodes,
            sampling=Sampling(**asked),
            sequence_id=int(sequence_id),
            eos_ids=frozenset() if ignore_eos else self._eos_ids(prompt, chat),
            stop=stop_at(self.tokenizer, strings) if strings else None,
        )

    def continue_with(self, state: State, prompt: Prompt, *, max_new_tokens: int | None = 256) -> None:
        """Make a finished state ready for a longer conversation; shared keys and values are kept."""
        tokens = self.encode(prompt, chat=True)
        state.continue_with(tokens, self._check_length(tokens, max_new_tokens))

    def cycles(self, state: State) -> Iterator[Cycle]:
        """Write one state to its end."""
        for (cycle,) in generate(self.target, self.proposer, [state], self.tree_size):
            yield cycle

    def encode(self, prompt: Prompt, chat: bool = True) -> list[int]:
        """Token ids of a prompt: through the tokenizer's chat template, or raw."""
        prompt = prompt_forms.read(prompt)
        if isinstance(prompt, str):
            if not chat:
                return [int(i) for i in self.tokenizer(prompt).input_ids]
            prompt = [{"role": "user", "content": prompt}]
        ids: Any = prompt
        if isinstance(prompt[0], int):
            return list(ids)
        if not self.tokenizer.chat_template:
            raise CoralError(
                "this target's tokenizer has no chat template; use raw prompts (chat=False, --raw)."
            )
        chat_format.refuse_template(self.tokenizer)
        messages: Any = list(prompt)
        try:
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template is a program, which may raise anything
            raise CoralError(
                f"the target's chat template refuses these messages: {chat_format.template_fault(error)}; "
                "change them, or use a raw prompt (chat=False, --raw)."
            ) from error
        return [int(i) for i in ids]

    def _eos_ids(self, prompt: Prompt, chat: bool) -> frozenset[int]:
        """What ends the text: of an answer to chat messages also the token that ends it in the template."""
        rendered = chat if isinstance(prompt, str) else not isinstance(prompt[0], int)
        return self.target.eos_ids | self._turn_ends if rendered else self.target.eos_ids

    @cached_property
    def _turn_ends(self) -> frozenset[int]:
        end = chat_format.end_of_turn(self.tokenizer)
        return frozenset() if end is None else frozenset([end])

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.target.tokenizer is None:
            raise CoralError("the target was loaded without a tokenizer; pass tokenizer=... or token ids.")
        return self.target.tokenizer

    def _check_length(self, tokens: list[int], max_new_tokens: int | None) -> int:
        asked = 256 if max_new_tokens is None else max_new_tokens
        if not isinstance(asked, Integral) or asked < 1:
            raise CoralError(f"max_new_tokens is {asked!r}, but it must be a whole number from 1 on.")
        context = self.target.context_length
        if len(tokens) >= context:
            raise CoralError(
                f"the prompt has {len(tokens)} tokens, but the target's context is {context}; shorten it."
            )
        return min(len(tokens) + int(asked), context)
