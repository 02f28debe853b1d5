"""A target and a proposer, ready to write: what `coral.load` returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coral.data import chat_format
from coral.decoding import prompts
from coral.decoding.cycle import Proposer, generate
from coral.decoding.fallback import Fallback
from coral.decoding.plain import Plain
from coral.decoding.prompts import Prompt
from coral.decoding.sampling import Sampling
from coral.decoding.state import Cycle, State
from coral.decoding.text import Detokenizer, Stop, cut_at, stop_at, stop_strings
from coral.drafters import tuned
from coral.drafters.names import located, read_name
from coral.errors import CoralError
from coral.target import default as models
from coral.target.native import why_not_native
from coral.target.target import Target
from coral.tree import CPU_DEFAULT, DEFAULT, LOOKUP_NODES, TreeSize

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from coral.drafters.feature.network import Drafter


def load(
    target: str | Path | PreTrainedModel | Target | None = None,
    drafter: str | Path | Drafter | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str | torch.dtype | None = "auto",
    device: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    attention: str | None = "sdpa",
    tree_size: TreeSize | None = None,
    backend: str = "auto",
    head: str | None = "auto",
    coupled: bool = True,
    fallback: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LLM:
    """Load a target and what drafts for it.

    Args:
        target: directory, hub id, loaded model, or None for SmolLM2-135M-Instruct, which is fetched once, and
            the drafter that the package has for it.
        dtype: see `Target.load`; without a target "auto" keeps the file's blocks packed where that can be.
        drafter: drafter directory or hub id ("me/drafter", pinned as "me/drafter@REVISION"), "ngram" (prompt
            lookup, no training), both in one tree as "DIRECTORY+ngram", a drafter that is already loaded, or
            None for plain decoding.
        tree_size: how large draft trees grow; None: what `coral tune` found for this drafter here, else
            `tree.DEFAULT`, or `tree.CPU_DEFAULT`.
        backend: see `Target.on`.
        head: the drafter's LM head, see `heads.load`.
        coupled: at temperature > 0 draft with the noise that the sampler will use.
        fallback: take plain steps while drafting is slower than they are.

    Raises:
        CoralError: not found, not supported, or a drafter of another target.
    """
    head = head or "auto"
    if target is None and drafter is None:
        drafter = models.DRAFTER
    if isinstance(drafter, str):
        drafter = located(drafter, head)
    if not isinstance(target, Target):
        loading: dict[str, Any] = {
            "tokenizer": tokenizer,
            "dtype": dtype,
            "device": device,
            "device_map": device_map,
            "attention": attention,
        }
        if target is None:
            target = models.load_to_write(**loading)
        else:
            loading |= {"revision": revision, "trust_remote_code": trust_remote_code}
            target = Target.load(target, **loading)
    target = target.on(backend)
    tree_size, origin = choose_tree_size(target, drafter, tree_size, head)
    if backend == "graphs":
        target = target.on(backend, (1, tree_size.num_nodes + 1))
    proposer = make_proposer(target, drafter, coupled, head)
    if fallback and not isinstance(proposer, Plain):
        proposer = Fallback(proposer)
    slow = backend == "auto" and target.backend != "native" and target.device.type == "cpu"
    return LLM(target, proposer, tree_size, origin, why_not_native(target) if slow else None)


def choose_tree_size(
    target: Target,
    drafter: str | Path | Drafter | None,
    asked: TreeSize | None = None,
    head: str = "auto",
) -> tuple[TreeSize, str]:
    """The tree size that a drafter gets, and where it comes from: "asked for", "tuned" or "default".

    Tuned is what `coral tune` found for this drafter and head on such a device, with a target of this dtype,
    number of layers and backend.

    Raises:
        CoralError: no such drafter or head, or a file of tuned trees that cannot be read.
    """
    from coral.drafters import checkpoint
    from coral.drafters.feature.network import Drafter
    from coral.drafters.heads import store as heads

    if asked is not None:
        return asked, "asked for"
    found, lookup = None, False
    if not isinstance(drafter, Drafter):
        source, head, lookup = read_name(drafter, head)
        if source is not None:
            directory = checkpoint.locate(source)
            found = tuned.find(directory, tuned.Conditions.of(target, heads.resolve(directory, head)))
    tree_size = found or (CPU_DEFAULT if target.device.type == "cpu" else DEFAULT)
    if lookup:
        tree_size = replace(tree_size, num_nodes=max(tree_size.num_nodes, LOOKUP_NODES))
    return tree_size, "tuned" if found else "default"


def make_proposer(
    target: Target,
    drafter: str | Path | Drafter | None,
    coupled: bool = True,
    head: str = "auto",
) -> Proposer:
    """The proposer that `drafter` names, see `read_name`.

    Raises:
        CoralError: no such drafter or head, or a drafter of another target.
    """
    from coral.decoding.merged import Merged
    from coral.drafters import checkpoint
    from coral.drafters.feature.network import Drafter
    from coral.drafters.feature.propose import Feature
    from coral.drafters.heads import store as heads
    from coral.drafters.lookup import NGram

    if isinstance(drafter, Drafter):
        own = heads.of_target(target, heads.DEFAULT_HEAD if head == "auto" else head)
        return Feature(_fitted(drafter, target), target, own, coupled)
    source, head, lookup = read_name(drafter, head)
    if source is None:
        return NGram() if lookup else Plain()
    device = target.head_weight.device
    loaded = checkpoint.load(source, target, dtype=target.dtype, device=device)
    trained = Feature(loaded, target, heads.load(source, target, head), coupled)
    return Merged(trained, NGram()) if lookup else trained


def _fitted(drafter: Drafter, target: Target) -> Drafter:
    """A loaded drafter in the target's dtype and on its device; copied where that changes it."""
    drafter.config.check_sizes(target)
    weight, wanted = drafter.fc.weight, target.head_weight
    if (weight.dtype, weight.device) == (wanted.dtype, wanted.device):
        return drafter
    return deepcopy(drafter).to(device=wanted.device, dtype=wanted.dtype)


class LLM:
    """A target and its proposer. The text never depends on the proposer, only the speed does.

    tree_size: how large draft trees grow; tree_size_origin: where it comes from, see `choose_tree_size`.
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
        """The whole answer as text, special tokens and stop string left out; of several prompts, which are
        written together, a list of answers. Options: see `start`.
        """
        several = isinstance(prompt, list | tuple) and {*map(type, prompt)} == {str}
        asked: Any = prompt if several else [prompt]
        first = options.pop("sequence_id", 0)
        states = [self.start(each, sequence_id=first + i, **options) for i, each in enumerate(asked)]
        for _ in generate(self.target, self.proposer, states, self.tree_size):
            pass
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
        temperature: float | None = 0.0,
        top_k: int | None = 0,
        top_p: float | None = 1.0,
        seed: int | None = 0,
        stop: Stop = (),
        chat: bool = True,
        ignore_eos: bool = False,
        sequence_id: int = 0,
    ) -> State:
        """The state of a new text.

        Args:
            prompt: a question (or with chat=False a text to go on with), chat messages, or token ids, in any
                form that `prompts.read` knows. Of the options, None is the default.
            max_new_tokens: the text also ends where the target's context does.
            stop: the text ends before this string, or any of these.
            seed, sequence_id: the same two give the same text, whatever the machine, batch or drafter.

        Raises:
            CoralError: an empty prompt, one longer than the context, or an option out of range.
        """
        prompt = prompts.read(prompt)
        tokens = self.encode(prompt, chat)
        strings = stop_strings(stop)
        length = self._check_length(tokens, max_new_tokens)
        if not isinstance(sequence_id, Integral):
            raise CoralError(f"sequence_id is {sequence_id!r}, but it must be a whole number.")
        drawn: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        return State.begin(
            self.target,
            tokens,
            length - len(tokens),
            self.tree_size.num_nodes,
            sampling=Sampling(**{name: value for name, value in drawn.items() if value is not None}),
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
        prompt = prompts.read(prompt)
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
