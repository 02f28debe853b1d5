"""What the options of transformers' `generate` mean here, and which are refused, each with the reason.

Shapes: B texts of a batch, T their width.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coral.decoding.sampling import Sampling
from coral.errors import CoralError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

# Processors whose scores depend on the text along the path, with the option that makes each and turns it off.
_PATH_DEPENDENT = {
    "RepetitionPenaltyLogitsProcessor": "repetition_penalty=1.0",
    "EncoderRepetitionPenaltyLogitsProcessor": "encoder_repetition_penalty=1.0",
    "NoRepeatNGramLogitsProcessor": "no_repeat_ngram_size=0",
    "EncoderNoRepeatNGramLogitsProcessor": "encoder_no_repeat_ngram_size=0",
    "SequenceBiasLogitsProcessor": "sequence_bias=None",
    "NoBadWordsLogitsProcessor": "bad_words_ids=None",
    "MinLengthLogitsProcessor": "min_length=0, min_new_tokens=None",
    "MinNewTokensLengthLogitsProcessor": "min_length=0, min_new_tokens=None",
    "PrefixConstrainedLogitsProcessor": "prefix_allowed_tokens_fn=None",
    "ForcedBOSTokenLogitsProcessor": "forced_bos_token_id=None",
    "ForcedEOSTokenLogitsProcessor": "forced_eos_token_id=None",
    "ExponentialDecayLengthPenalty": "exponential_decay_length_penalty=None",
    "SuppressTokensAtBeginLogitsProcessor": "begin_suppress_tokens=None",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale=None",
    "WatermarkLogitsProcessor": "watermarking_config=None",
    "SynthIDTextWatermarkLogitsProcessor": "watermarking_config=None",
}
# Processors that the sampler could have, but has not.
_UNKNOWN = {
    "MinPLogitsWarper": "min_p=None",
    "TopHLogitsWarper": "top_h=None",
    "TypicalLogitsWarper": "typical_p=1.0",
    "EpsilonLogitsWarper": "epsilon_cutoff=0.0",
    "EtaLogitsWarper": "eta_cutoff=0.0",
    "SuppressTokensLogitsProcessor": "suppress_tokens=None",
    "InfNanRemoveLogitsProcessor": "remove_invalid_values=False",
    "LogitNormalization": "renormalize_logits=False",
}
# Processors that the sampler has, in the order in which it applies them.
_SAMPLER = {
    "TemperatureLogitsWarper": "temperature",
    "TopKLogitsWarper": "top_k",
    "TopPLogitsWarper": "top_p",
}

# Options that ask for another way of writing: the values that do not, and why it is not offered.
_OTHER_WAYS: dict[str, tuple[Any, str]] = {
    "num_beams": (1, "beam search follows several texts, and a draft tree grows from one"),
    "num_beam_groups": (1, "beam search follows several texts, and a draft tree grows from one"),
    "constraints": (None, "constraints belong to beam search, and a draft tree grows from one text"),
    "force_words_ids": (None, "constraints belong to beam search, and a draft tree grows from one text"),
    "penalty_alpha": (0.0, "contrastive search scores a token by the text before it, path by path"),
    "dola_layers": (None, "DoLa reads the logits of early layers, which are not verified"),
    "prompt_lookup_num_tokens": (None, "it drafts, and so does this function ('ngram' is our prompt lookup)"),
    "assistant_early_exit": (None, "it drafts, and so does this function"),
    "use_mtp": (False, "it drafts, and so does this function"),
    "cache_implementation": (None, "decoding keeps its own cache"),
}
# What each of these options is where it asks for nothing.
_OFF: dict[str, Any] = (
    {
        name: ast.literal_eval(value)
        for off in (*_PATH_DEPENDENT.values(), *_UNKNOWN.values())
        for name, _, value in (part.partition("=") for part in off.split(", "))
    }
    | {name: plain for name, (plain, _) in _OTHER_WAYS.items()}
    | {"stop_strings": None}
)
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def refuse_others(model: PreTrainedModel, config: GenerationConfig) -> None:
    """Raise CoralError for what `generate` would do and we do not."""
    if model.training:
        raise CoralError("the model is in training mode, where dropout is at work; call model.eval() first.")
    for name, (plain, why) in _OTHER_WAYS.items():
        if (value := getattr(config, name, None)) not in (None, plain):
            raise CoralError(f"{name}={value!r} is not offered: {why}; leave it out.")
    for name in _OUTPUTS:
        if config.return_dict_in_generate and getattr(config, name, False):
            raise CoralError(
                f"{name} is not offered: a forward here verifies a tree, most of which is not the text; call "
                "the model once on the returned sequences."
            )


def read_prompts(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool = True,
    logits_to_keep: int = 1,
    **others: Any,
) -> list[list[int]]:
    """The prompts of a batch [B, T] without their padding on the left.

    `use_cache` and `logits_to_keep` make no difference: the cache is ours, and so is the forward.

    Raises:
        CoralError: inputs that are not offered.
    """
    if odd := sorted(name for name, value in others.items() if value is not None):
        raise CoralError(
            f"{', '.join(odd)}: not offered, since a draft tree is verified from token ids alone; "
            "leave it out."
        )
    if past_key_values is not None and past_key_values.get_seq_length() > 0:
        raise CoralError(
            "past_key_values that hold a text are not offered: the drafter has to read the text too; pass "
            "all of it as input_ids."
        )
    if getattr(past_key_values, "_is_user_defined", False):
        raise CoralError("past_key_values would not be filled: decoding keeps its own cache; leave it out.")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    real = mask.bool()
    if not real.any(-1).all():
        raise CoralError("a prompt is empty; give every text at least one token that is not masked.")
    if (real[:, :-1] & ~real[:, 1:]).any():
        raise CoralError(
            "attention_mask masks tokens behind the first that counts; pad on the left, as "
            "padding_side='left' does."
        )
    if position_ids is not None and (position_ids != real.cumsum(-1) - 1)[real].any():
        raise CoralError("position_ids that do not count from 0 are not offered; leave them out.")
    return [ids[keep].tolist() for ids, keep in zip(input_ids, real, strict=True)]


def read_sampling(config: GenerationConfig, processors: Sequence[Any]) -> Sampling:
    """The law that the processors stand for; the seed is drawn from torch's generator.

    Raises:
        CoralError: a processor that the sampler does not have, by name and with the reason.
    """
    found: dict[str, Any] = {}
    order = list(_SAMPLER)
    for processor in processors:
        name = type(processor).__name__
        if name not in _SAMPLER:
            raise _refused_processor(name)
        if name not in order:
            raise CoralError(
                f"{name} comes twice or out of order; the sampler applies temperature, top_k and top_p once, "
                "in this order."
            )
        order = order[order.index(name) + 1 :]
        found[_SAMPLER[name]] = getattr(processor, _SAMPLER[name])
    if not config.do_sample:
        return Sampling()
    seed = int(torch.randint(2**62, ()))
    return Sampling(**{"temperature": 1.0, **found, "seed": seed})


def not_applied(given: Mapping[str, Any], sampling: Sampling) -> list[str]:
    """What a model's generation config asks for and a text of `sampling` does not do, as `name=value`."""
    asked = [name for name, off in _OFF.items() if given.get(name) not in (None, off)]
    if given.get("do_sample"):
        own = {name: getattr(sampling, name) for name in _SAMPLER.values()}
        asked = [name for name in own if given.get(name) not in (None, own[name])] + asked
        asked = ["do_sample"] * (sampling.temperature == 0) + asked
    return [f"{name}={given[name]!r}" for name in asked]


def _refused_processor(name: str) -> CoralError:
    if name in _PATH_DEPENDENT:
        why = "its scores depend on the text before them, so they differ along every path of a draft tree"
    else:
        why = "the sampler has temperature, top_k and top_p only"
    off = (_PATH_DEPENDENT | _UNKNOWN).get(name)
    what = (
        f"leave it out with {off} (the model's generation_config may ask for it)" if off else "leave it out"
    )
    return CoralError(f"{name} is not offered: {why}; {what}.")
