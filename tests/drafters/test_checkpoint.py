"""A drafter directory: bitwise round trip, and a refusal for everything that does not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import tiny_drafter, tiny_target

from coral.drafters import checkpoint
from coral.errors import CoralError
from coral.target.record import TargetRecord

PLAIN_EAGLE = {
    "fc.weight",
    *(f"layers.0.self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "layers.0.post_attention_layernorm.weight",
}


@pytest.fixture
def saved(tmp_path):
    target = tiny_target()
    checkpoint.save(tiny_drafter(), tmp_path / "drafter", target=TargetRecord.of(target))
    return tmp_path / "drafter", target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "normalised_feedback": True}])
def test_round_trip_is_bitwise(tmp_path, dtype, options):
    """Stops: a tensor or an option lost on the way, and weights that change dtype."""
    target, drafter = tiny_target(), tiny_drafter(**options).to(dtype)
    checkpoint.save(drafter, tmp_path / "d", target=TargetRecord.of(target), recipe={"steps": 3})
    loaded = checkpoint.load(tmp_path / "d", target)
    assert loaded.config == drafter.config
    assert loaded.state_dict().keys() == drafter.state_dict().keys()
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]) and loaded.state_dict()[name].dtype == dtype
    assert torch.equal(loaded.rotary.inv_freq, tiny_drafter().rotary.inv_freq)  # float32 whatever the dtype


def test_top_level_is_the_plain_eagle_layout(saved):
    """Stops: a name that vLLM refuses or silently drops, and `bias`, which engines read as attention bias."""
    directory, _ = saved
    assert set(load_file(directory / "model.safetensors")) == PLAIN_EAGLE
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["bias"] is False
    assert (config["vocab_size"], config["num_hidden_layers"], config["rope_theta"]) == (31, 1, 10000.0)
    assert config["tie_word_embeddings"] is False
    names = ["config.json", "coral", "custom_generate", "model.safetensors"]
    assert sorted(path.name for path in directory.iterdir()) == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("fc.weight"), "lacks the tensors fc.weight"),
        (lambda t: t.update({"lm_head.weight": torch.ones(1)}), "no place for: lm_head.weight"),
        (lambda t: t.update({"fc.weight": torch.ones(2, 3)}), "fc.weight has shape \\(2, 3\\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(saved, change, message):
    """Stops: a drafter that loads with random weights and drafts garbage without a word."""
    directory, target = saved
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CoralError, match=message):
        checkpoint.load(directory, target)


def test_another_target_is_refused(saved):
    """Stops: a drafter running on a target it was not trained for, with an acceptance length of 1."""
    directory, target = saved
    for other, message in (
        (tiny_target(vocab_size=33), "vocab_size 31, but the target tiny has 33"),
        (tiny_target(hidden_size=20), "hidden_size 16, but the target tiny has 20"),
        (tiny_target(seed=7), "trained for the target tiny, but tiny has other weights"),
    ):
        with pytest.raises(CoralError, match=message):
            checkpoint.load(directory, other)
    target.name = "moved/elsewhere"  # the same weights under another name are the same target
    checkpoint.load(directory, target)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16, torch.float16])
def test_a_target_is_the_same_in_every_dtype(tmp_path, stored, trained):
    """Stops: a target that is said to have other weights when it is loaded in float16, whose small numbers
    are coarser than those of bfloat16."""
    target = tiny_target(hidden_size=64)
    with torch.no_grad():
        target.head_weight.mul_(torch.logspace(-6, 0, 64))  # many numbers below the normal ones of float16
    target.model.to(stored)

    def loaded(dtype):
        other = tiny_target(hidden_size=64)
        other.model.to(dtype).load_state_dict(target.model.state_dict())
        other.head_weight = other.model.lm_head.weight
        return other

    record = TargetRecord.of(loaded(trained))
    dtypes = {torch.float32, torch.bfloat16, torch.float16}
    if stored == torch.float32 and trained != torch.float32:
        dtypes = {torch.float32, trained}  # what was lost in training cannot be told from other weights
    for dtype in dtypes:
        assert record.has_weights_of(TargetRecord.of(loaded(dtype)))
    with torch.no_grad():
        target.head_weight[-1, -1] *= 1.5
    assert not any(record.has_weights_of(TargetRecord.of(loaded(dtype))) for dtype in dtypes)


def test_what_is_not_a_drafter_is_refused_and_left_alone(tmp_path, saved):
    """Stops: saving over a directory of other files, and stack traces for a wrong path."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(CoralError, match="not a drafter"):
        checkpoint.save(tiny_drafter(), tmp_path / "home", target=TargetRecord.of(tiny_target()))
    assert (tmp_path / "home" / "thesis.txt").exists()
    with pytest.raises(CoralError, match="no drafter directory"):
        checkpoint.load(tmp_path / "nothing")
    with pytest.raises(CoralError, match="not a CORAL drafter"):
        checkpoint.load(tmp_path / "home")
    directory, _ = saved
    (directory / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(CoralError, match="cannot be read"):
        checkpoint.load(directory)


def test_starting_from_a_target_layer_copies_it_or_refuses():
    """Stops: a layer of another family being half copied."""
    target, drafter = tiny_target(), tiny_drafter()
    layer = target.model.model.layers[-1]
    drafter.init_from_layer(layer)
    assert torch.equal(drafter.layers[0].mlp.up_proj.weight, layer.mlp.up_proj.weight)
    layer.self_attn.q_norm = torch.nn.LayerNorm(6)
    with pytest.raises(CoralError, match="q_norm"):
        drafter.init_from_layer(layer)
    with pytest.raises(CoralError, match="has shape"):
        tiny_drafter(intermediate_size=8).init_from_layer(tiny_target().model.model.layers[0])


def test_starting_from_a_smaller_drafter_computes_the_same():
    """Stops: a warm start that forgets what the smaller drafter knew, or keeps parts of a larger one."""
    small, large = tiny_drafter(), tiny_drafter(num_layers=2, intermediate_size=48)
    large.init_from_drafter(small)
    rows = torch.randn(2, 1, 5, 16)
    positions = torch.arange(5)[None]
    assert torch.allclose(large(*rows, positions), small(*rows, positions), atol=1e-6)
    with pytest.raises(CoralError, match="only intermediate_size and num_layers may be larger"):
        small.init_from_drafter(large)
