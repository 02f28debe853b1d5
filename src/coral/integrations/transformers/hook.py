"""Inside transformers: `model.generate(..., custom_generate=coral.for_transformers(drafter))`.

`generate` prepares the inputs, the configuration, the logits processors and the stopping criteria as ever and
calls us in place of its own loop. Shapes: B texts of a batch, padded on the left; T their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from coral.api import LLM
from coral.decoding.cycle import generate as decode
from coral.decoding.sampling import Sampling
from coral.decoding.state import State
from coral.drafters.drafting import Drafting
from coral.errors import CoralError
from coral.integrations.transformers.generate_options import read_prompts, read_sampling, refuse_others
from coral.target.grouped_sdpa import GROUPED_SDPA
from coral.target.target import Target
from coral.tree import TreeSize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


def for_transformers(
    drafter: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    streamer: BaseStreamer | None = None,
    *,
    tree: TreeSize | None = None,
    head: str = "auto",
    coupled: bool = True,
    fallback: bool = True,
) -> Callable[..., GenerateDecoderOnlyOutput | Tensor]:
    """What `model.generate(..., custom_generate=)` takes to write faster: the result is that of `generate`.

    Greedy texts equal those of `generate`; sampled ones have the same law, with a seed that is drawn from
    torch's generator, so that `torch.manual_seed` repeats them. What is loaded is kept with the model: a
    second call, with this or an equal function, loads nothing.

    Args:
        drafter: as `coral.load` takes it. Loaded in the model's dtype, on its device, at the first call.
        tokenizer: for `stop_strings=`. transformers keeps its own `tokenizer=` from a function.
        streamer: gets what it would get from `generate`, for the same reason.
        tree, head, coupled, fallback: as `coral.load` takes them.

    Raises (when called):
        CoralError: an option of `generate` that is not offered, with the reason; a model that is not
            supported; a drafter of another model.
    """
    drafter = str(drafter) if isinstance(drafter, Path) else drafter  # one name for one drafter
    drafting = Drafting.parse(drafter, tree=tree, head=head, coupled=coupled, fallback=fallback)

    def generate(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Sequence[Any],
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        stop_strings: str | list[str] | None = None,
        **inputs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        refuse_others(model, generation_config)
        prompts = read_prompts(input_ids, **inputs)
        sampling = read_sampling(generation_config, logits_processor)
        if stop_strings is not None:
            if tokenizer is None:
                raise CoralError(
                    "stop_strings needs the tokenizer; pass it as coral.for_transformers(drafter, tokenizer)."
                )
            stop = StopStringCriteria(tokenizer, stop_strings)
            stopping_criteria = StoppingCriteriaList([*stopping_criteria, stop])
        with _attention(model):
            pair = _pair(model, drafting)
            pad = generation_config._pad_token_tensor
            pad_id = 0 if pad is None else int(pad)
            sequences = _write(pair, input_ids, prompts, sampling, stopping_criteria, pad_id, streamer)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
        return sequences

    return generate


def generate_with(
    model: Any,
    drafter: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    streamer: BaseStreamer | None = None,
    assistant_model: PreTrainedModel | None = None,
    revision: str | None = None,
    **arguments: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """What `model.generate(..., custom_generate=DRAFTER, trust_remote_code=True)` comes down to.

    Args:
        arguments: of `generate`. `revision` is that of the drafter on the hub.

    Raises:
        CoralError: see `for_transformers`.
    """
    if assistant_model is not None:
        raise CoralError("assistant_model drafts, and so does custom_generate; leave out one of the two.")
    source = drafter if revision is None or Path(drafter).is_dir() else f"{drafter}@{revision}"
    written = for_transformers(source, tokenizer, streamer)
    return model.generate(**arguments, custom_generate=written)


def _write(
    pair: LLM,
    input_ids: Tensor,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    criteria: StoppingCriteriaList,
    pad_id: int,
    streamer: BaseStreamer | None,
) -> Tensor:
    """All texts, [B, T] int64, padded behind their ends if there are end tokens, as `generate` does.

    The criteria are asked as `generate` asks them, once a token, about the whole batch as it is then: a text
    that is ahead of the others waits, and is cut where it is found to have ended.
    """
    batch, width = input_ids.shape
    end = max(width + 1, min(c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)))
    eos = frozenset(i for c in criteria if isinstance(c, EosTokenCriteria) for i in c.eos_token_id.tolist())
    pads = any(hasattr(c, "eos_token_id") for c in criteria)  # as `generate` decides it
    padding = [width - len(prompt) for prompt in prompts]
    if (longest := end - min(padding)) > (context := pair.target.context_length):
        raise CoralError(
            f"the texts may grow to {longest} tokens, but the model's context is {context}; ask for at most "
            f"max_new_tokens={context - width + min(padding)}."
        )
    nodes, asked = pair.tree_size.num_nodes, {"sampling": sampling, "eos_ids": eos}
    states = [
        State.begin(pair.target, prompt, end - left - len(prompt), nodes, sequence_id=row, **asked)
        for row, (prompt, left) in enumerate(zip(prompts, padding, strict=True))
    ]
    if streamer is not None:
        streamer.put(input_ids.cpu())
    texts = torch.full((batch, end), pad_id, device=input_ids.device)
    texts[:, :width] = input_ids
    filled, running = [width] * batch, [True] * batch
    for _ in decode(pair.target, pair.proposer, states, pair.tree_size):
        for row, state in enumerate(states):
            if (there := padding[row] + len(state.tokens)) > filled[row]:
                new = state.tokens[filled[row] - there :]
                texts[row, filled[row] : there] = torch.tensor(new, device=texts.device)
                filled[row] = there
        # Without end tokens `generate` writes on in a text that has ended, until the last one has.
        while any(running) and width < min(f for f, r in zip(filled, running, strict=True) if r or not pads):
            width += 1
            ended = criteria(texts[:, :width], None).tolist()
            if streamer is not None:
                streamer.put(texts[:, width - 1].cpu())
            for row in [row for row in range(batch) if running[row] and ended[row]]:
                running[row] = False
                if pads:
                    states[row].done = True
                    texts[row, width:] = pad_id
        if not any(running):
            break
    if streamer is not None:
        streamer.end()
    return texts[:, :width].clone()


def _pair(model: PreTrainedModel, drafting: Drafting) -> LLM:
    """The model wrapped, with what drafts for it. What is loaded at the first call is kept with the model,
    for trees of any size.
    """
    weight = model.get_output_embeddings().weight
    wanted = (replace(drafting, tree=None), weight.dtype, weight.device)
    kept = model.__dict__.get("_coral")
    if not isinstance(kept, _Kept):
        kept = model.__dict__["_coral"] = _Kept()
    pair = kept.get(wanted)
    if pair is None or pair.target.head_weight is not weight:  # a resized model has another head
        target, here = Target(model, freeze=False), wanted[0].located()
        pair = kept[wanted] = LLM(target, here.proposer(target), *here.tree_size(target))
    return pair if drafting.tree is None else LLM(pair.target, pair.proposer, drafting.tree)


class _Kept(dict[Any, LLM]):
    """What was loaded for a model. It lies in the model's own dictionary and so lives as long as the model;
    copies and pickles of the model get an empty one.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple[type, tuple[()]]:
        return dict, ()


@contextmanager
def _attention(model: PreTrainedModel) -> Iterator[None]:
    """Run the model with a kernel that takes the mask of a tree, then give it back its own."""
    before = model.config._attn_implementation
    if before != "eager":
        model.config._attn_implementation = GROUPED_SDPA
    try:
        yield
    finally:
        model.config._attn_implementation = before
