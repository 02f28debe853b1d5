"""An EAGLE-3 drafter that others published, made one of ours: SafeAILab, SpecForge, Automodel, speculators.

What they leave out is filled in as engines do: an LM head is the target's, a draft vocabulary without `d2t`
is all ids, the layers are 2, n // 2 and n - 3 of the target's n, a rotary base is 10,000. A key of
config.json that says of another function, or is not known here, is refused by name.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig

from coral.drafters.checkpoint import check_tensors
from coral.drafters.eagle3.fused_network import FusedConfig, FusedDrafter
from coral.errors import CoralError
from coral.export import fused_layout
from coral.export.published import EagleTarget, Stored, check_rows, drop_biases, reading, sizes_of

_LAYER = "midlayer."
_NESTED = "eagle_config"
_LAYERS = "eagle_aux_hidden_state_layer_ids"

# What a key must be where it is given: another value is another function.
_MUST = {
    "norm_before_residual": False, "norm_before_fc": False, "attention_bias": False, "mlp_bias": False,
    "qkv_bias": False, "use_qk_norm": False, "use_aux_hidden_state": True, "use_last_layernorm": True,
    "use_input_layernorm_in_first_layer": True, "use_mtp_layernorm": False, "parallel_draft_step": 1,
    "num_hidden_layers": 1, "use_sliding_window": False,
}  # fmt: skip
# Keys that are read, or whose values the tensors decide.
_READ = fused_layout.KEYS | {"target_hidden_size", _LAYERS, _NESTED}
# Keys that only say where a drafter comes from, or how it was trained, and those of the target's family that
# SpecForge's recipes carry along, which a Llama-shaped layer does not read.
_ASIDE = {
    "auto_map", "eagle_decoder_type", "embed_requires_grad", "has_lm_head", "pretraining_tp",
    "speculators_config", "speculators_model_type", "speculators_version", "transformers_version",
    "use_cache", "_name_or_path", "_attn_implementation", "target_model_type", "max_window_layers",
    "sliding_window", "decoder_sparse_step",
}  # fmt: skip


def is_in(stored: Stored) -> bool:
    """Whether tensors have the names of this layout."""
    return any("hidden_norm." in name or name.startswith(_LAYER) for name in stored.tensors)


def build(stored: Stored, target: EagleTarget) -> FusedDrafter:
    """The drafter that is stored in the EAGLE-3 layout, in its dtype, ready to run with `target`.

    Raises:
        CoralError: a tensor that is missing, left over or of another shape; a bias that is not zero; an
            embedding that is not the target's; a key that says of another function.
    """
    file, given = stored.file, _flat(stored.config)
    tensors = {_ours(name): tensor for name, tensor in stored.tensors.items()}
    drop_biases(file, tensors)
    embedding = tensors.pop("embed_tokens.weight", None)
    needed = {"fc.weight", *(f"{_LAYER}{name}" for name in fused_layout.IN_THE_LAYER)}
    if missing := sorted(needed - tensors.keys()):
        raise CoralError(
            f"{file} lacks the tensors {', '.join(missing)} of an EAGLE-3 drafter; copy it again, or use "
            "another one."
        )
    renamed = Stored(file, tensors, given)
    config = _config(renamed, target)
    _fill_in(renamed, config, target)
    drafter = FusedDrafter(config)
    check_tensors(file, {name: t.shape for name, t in drafter.state_dict().items()}, tensors)
    if embedding is not None:
        check_rows(file, "embed_tokens.weight", embedding, target, target.embed)
    drafter = drafter.to(dtype=tensors["fc.weight"].dtype)
    drafter.load_state_dict(tensors)
    return drafter.eval().requires_grad_(False)


def _ours(name: str) -> str:
    return name.replace("layers.0.", _LAYER, 1) if name.startswith("layers.0.") else name


def _config(stored: Stored, target: EagleTarget) -> FusedConfig:
    path, given, tensors = stored.config_file, stored.config, stored.tensors
    with reading(path):
        _refuse_other_functions(stored, target)
        head = tensors.get("lm_head.weight", tensors.get("d2t"))
        return FusedConfig(
            **sizes_of(stored, _LAYER, target),
            layers=_layers(stored, target),
            draft_vocab_size=target.config.vocab_size if head is None else len(head),
            fc_norm=bool(given.get("fc_norm")) or any(name in tensors for name in fused_layout.FC_NORM),
            norm_output=bool(given.get("norm_output")),
        )


def _refuse_other_functions(stored: Stored, target: EagleTarget) -> None:
    given, nested = stored.config, stored.config.get(_NESTED) or {}
    inert = _ASIDE | LlamaConfig().to_dict().keys()
    sizes = {"vocab_size": target.config.vocab_size, "target_hidden_size": target.hidden_size}
    for key, value in [*given.items(), *nested.items()]:
        expected = {**_MUST, **sizes}.get(key)
        if key in _MUST or key in sizes:
            if value is not None and value != expected:
                raise CoralError(
                    f"{key} is {value}, but only drafters with {expected} are read here, for others compute "
                    "something else; use another drafter."
                )
        elif key not in _READ | inert and value not in (None, False):
            raise CoralError(
                f"it says {key}, which is not known here, so the drafter's function may be another; use "
                "another one."
            )
    parts, odd = divmod(stored.tensors["fc.weight"].shape[-1], target.hidden_size)
    if odd or parts != 3:
        raise CoralError(
            f"fc.weight reads {stored.tensors['fc.weight'].shape[-1]} numbers, but three states of "
            f"{target.name} have {3 * target.hidden_size}; use the target that it was trained for."
        )


def _layers(stored: Stored, target: EagleTarget) -> tuple[int, int, int]:
    """Which layers' inputs are fused: vLLM's key says so, SGLang's counts the outputs."""
    count = target.config.num_hidden_layers
    entering = stored.config.get(_LAYERS)
    leaving = (stored.config.get(_NESTED) or {}).get(_LAYERS)
    if entering and leaving and [*entering] != [layer + 1 for layer in leaving]:
        raise CoralError(
            f"it names two sets of layers: {_LAYERS} {[*entering]} counts what enters them, and in {_NESTED} "
            f"{[*leaving]} what leaves them, which is one less; correct one of them."
        )
    if leaving:
        entering = [layer + 1 for layer in leaving]
    layers = tuple(entering or (2, count // 2, count - 3))
    if len(layers) != 3 or max(layers) >= count:
        raise CoralError(
            f"the layers {[*layers]} are not three of the target's {count}; use the target that it was "
            "trained for."
        )
    return layers


def _fill_in(stored: Stored, config: FusedConfig, target: EagleTarget) -> None:
    """Bring the draft vocabulary and the LM head among `stored.tensors` into our form."""
    tensors, whole = stored.tensors, config.draft_vocab_size == config.vocab_size
    own = torch.arange(config.draft_vocab_size)
    if "d2t" not in tensors and not whole:
        raise CoralError(
            f"{stored.file} has an LM head of {len(own)} ids, and no d2t that says which of the target's "
            f"{config.vocab_size} they are; copy the drafter again."
        )
    ids = own + tensors.pop("d2t", torch.zeros_like(own)).long()
    mask = torch.zeros(config.vocab_size, dtype=torch.bool)
    if int(ids.min()) < 0 or int(ids.max()) >= len(mask) or len(ids.unique()) < len(ids):
        raise CoralError(
            f"{stored.file}: d2t does not name {len(ids)} of the target's {len(mask)} ids, each once; copy "
            "the drafter again."
        )
    mask[ids] = True
    if (said := tensors.pop("t2d", None)) is not None and not said.bool().equal(mask):
        raise CoralError(f"{stored.file}: t2d and d2t name different ids; copy the drafter again.")
    if "lm_head.weight" not in tensors:
        weight = target.head_weight
        tensors["lm_head.weight"] = weight[ids.to(weight.device)].detach().cpu().to(tensors["fc.weight"])
    elif whole:  # in the target's order, as ours has no list then
        tensors["lm_head.weight"] = tensors["lm_head.weight"][ids.argsort()]
    if not whole:
        tensors |= {"d2t": ids - own, "t2d": mask}


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the speculators library, whose layer's sizes lie one deeper; others as they are."""
    inner = config.get("transformer_layer_config")
    if not isinstance(inner, dict):
        return config
    outer = {key: value for key, value in config.items() if key != "transformer_layer_config"}
    return {**inner, **outer}
