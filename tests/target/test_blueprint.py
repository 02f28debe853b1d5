"""What a forward is told of a model: as the model computes it, and kept by a file without a bit's loss."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from test_forward import CHANGES, DTYPES, KINDS, SIZES
from tiny import LLAMA3, prompt_of, random_tree, tiny_model

from coral.target.blueprint import Blueprint, why_not
from coral.target.grouped_sdpa import GROUPED_SDPA
from coral.target.native import NativeForward, _library
from coral.target.target import Target

YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 24}
ROPES = {
    "yarn": YARN,
    "llama3": LLAMA3,
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
}


def target_of(kind, dtype=torch.float32, **changes):
    target = Target(tiny_model(kind, GROUPED_SDPA, **SIZES | CHANGES.get(kind, {}) | changes).to(dtype))
    assert why_not(target) is None
    return target


def kept(blueprint):
    return Blueprint(**json.loads(json.dumps(asdict(blueprint))))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_keeps_a_blueprint(kind):
    """Stops a frequency that loses a bit on its way through JSON, and a value that JSON changes."""
    blueprint = Blueprint.of(target_of(kind))
    assert kept(blueprint) == blueprint


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [*KINDS, *ROPES])
def test_positions_turn_as_the_models_module_turns_them(kind, dtype):
    """Stops tables of angles that another order of rounding, or another scaling, makes."""
    rope = {"rope_parameters": ROPES[kind]} if kind in ROPES else {}
    target = target_of("llama" if rope else kind, dtype, **rope)
    blueprint = kept(Blueprint.of(target))
    if (library := _library()) is None:
        pytest.skip("no C++ compiler for this processor")
    forward = NativeForward(library, blueprint, dict(target.model.named_parameters()), dtype)
    forward._rotate(30)
    module = target.decoder.rotary_emb
    kinds = sorted({*target.config.layer_types}) if kind == "gemma3" else [None]
    for each, tables in zip(kinds, forward._tables, strict=True):
        asked = () if each is None else (each,)
        expected = module(torch.empty(1, dtype=dtype), torch.arange(30)[None], *asked)
        for own, model in zip(tables, expected, strict=True):
            assert torch.equal(own, model[0].float())


@pytest.mark.parametrize("kind", ["llama-tied", "gemma3", "qwen2", "phi3-partial", "olmo2"])
def test_a_forward_stands_without_the_model(kind):
    """Stops a forward that asks the model for more than its blueprint and the tensors of a file."""
    target = target_of(kind, torch.bfloat16)
    fast = target.on()
    if fast._native is None:
        pytest.skip("no C++ compiler for this processor")
    stored = {name: weight.clone() for name, weight in target.model.named_parameters()}
    alone = NativeForward(_library(), kept(Blueprint.of(target)), stored, torch.bfloat16)
    results = []
    for forward in (fast._native, alone):
        cache = target.new_cache(30)
        features = forward.read(cache, prompt_of(9), (-1,))
        results.append([features, *forward.verify([cache], [random_tree(7)], (-1,))])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_fused_matrix_of_another_size_has_no_blueprint():
    """Stops products that read past the end of a weight, in a model that was pruned by hand."""
    target = target_of("phi3")
    old = target.decoder.layers[1].mlp.gate_up_proj
    wider = torch.nn.Linear(old.in_features, old.out_features + 32, bias=False)
    target.decoder.layers[1].mlp.gate_up_proj = wider
    assert why_not(target) == "the sizes of its layers do not go together"


@pytest.mark.slow
def test_it_is_read_without_transformers():
    """Stops an import of seconds for a forward that a file describes."""
    code = "import sys, coral.target.native; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
