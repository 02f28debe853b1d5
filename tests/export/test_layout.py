"""Plain EAGLE directories: read as they are published, or refused with the tensor that does not fit."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from test_train import CONFIG, run, weights
from tiny_training import tiny_data, tiny_drafter, tiny_target

from coral.drafters import checkpoint
from coral.drafters.feature.learning_options import DrafterOptions
from coral.errors import CoralError
from coral.export import layout as eagle
from coral.export.read import read
from coral.target.record import TargetRecord
from coral.training.recipe import Limits
from coral.training.start import new_drafter

# As SafeAILab's drafters have it: heads but not their width, no rotary type, positions of the drafter's own.
CLAIMS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 999,  # wrong, and not believed
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 500.0,
    "rope_scaling": None,
    "vocab_size": 31,
}


def write(directory, tensors=None, kind="safetensors", prefix="", **claims):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CLAIMS | claims))
    tensors = {prefix + name: t.contiguous() for name, t in (tensors or published()).items()}
    if kind == "bin":
        torch.save(tensors, directory / "pytorch_model.bin")
    else:
        save_file(tensors, directory / "model.safetensors")
    return directory


def published(**options):
    """Float16, with the target's embedding and a bias that was never trained."""
    drafter = tiny_drafter(intermediate_size=20, **options)
    tensors = {name: tensor.half() for name, tensor in drafter.state_dict().items()}
    embedding = tiny_target().model.get_input_embeddings().weight.detach().half()
    return {"embed_tokens.weight": embedding, "fc.bias": torch.zeros(16).half(), **tensors}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module.model."])
def test_published_directories_are_read(tmp_path, kind, prefix):
    """Stops: a checkpoint that loads with random weights because its names have a prefix, and sizes taken
    from a config that is wrong.
    """
    read = eagle.read(write(tmp_path / "e", kind=kind, prefix=prefix), tiny_target())
    expected = published()
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, expected[name]) and tensor.dtype == torch.float16
    config = read.config
    assert (config.head_dim, config.num_key_value_heads, config.intermediate_size) == (6, 2, 20)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500.0}
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-5, 128)


@pytest.mark.parametrize(
    ("claims", "rope"),
    [
        ({"rope_theta": None}, {"rope_type": "default", "rope_theta": 10000.0}),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            {"rope_type": "default", "rope_theta": 7.0},
        ),
    ],
)
def test_rotary_frequencies_in_every_spelling(tmp_path, claims, rope):
    """Stops: weights that run with other rotary frequencies than those they were trained with."""
    assert eagle.read(write(tmp_path / "e", **claims), tiny_target()).config.rope_parameters == rope


def test_several_layers_and_no_embedding(tmp_path):
    """Stops: a second layer that is silently left behind."""
    tensors = published(num_layers=2)
    del tensors["embed_tokens.weight"], tensors["fc.bias"]
    read = eagle.read(write(tmp_path / "e", tensors), tiny_target())
    assert read.config.num_layers == 2 and set(read.state_dict()) == set(tensors)


@pytest.mark.parametrize("claim", [{}, {"bias": False}])
def test_a_trained_bias_of_fc_is_kept(tmp_path, claim):
    """Stops: published drafters for Llama 2 and Vicuna, which have one, that are refused or lose it, at once
    or when training goes on from them.
    """
    bias = torch.linspace(-1, 1, 16).half()
    directory = write(tmp_path / "e", published() | {"fc.bias": bias}, **claim)
    read = eagle.read(directory, tiny_target())
    assert read.config.fc_bias and torch.equal(read.fc.bias, bias)
    checkpoint.save(read, tmp_path / "ours", target=TargetRecord.of(tiny_target()))
    config = replace(CONFIG, drafter=DrafterOptions(init_drafter=str(tmp_path / "ours")))
    assert torch.equal(new_drafter(tiny_target(), config, tiny_data().dataset).fc.bias, bias.float())


def odd(**changes):
    tensors = published()
    for name, tensor in changes.items():
        name = {"norm": "layers.0.input_layernorm.weight"}.get(name, name.replace("__", "."))
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    return tensors


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (odd(fc__weight=None), "lacks the tensors fc.weight"),
        (odd(lm_head__weight=torch.ones(31, 16)), "31 of 31 rows of lm_head.weight are not those"),
        (odd(norm=torch.ones(16)), "no place for: layers.0.input_layernorm.weight"),
        (odd(fc__weight=None, d2t=torch.ones(4)), "lacks the tensors fc.weight and holds .*: d2t;"),
        (odd(layers__0__self_attn__q_proj__bias=torch.ones(24)), "q_proj.bias is not zero"),
        (odd(fc__weight=torch.ones(16, 48)), r"fc.weight has shape \(16, 48\)"),
        (odd(fc__weight=torch.ones(20, 40)), "has hidden size 20, but the target tiny has 16"),
        (odd(fc__weight=torch.tensor(1.0)), "has hidden size 0"),
        (odd(embed_tokens__weight=torch.ones(32, 16)), r"shape \(32, 16\), but the target tiny has \(31, 16"),
        (odd(embed_tokens__weight=torch.ones(31, 16)), "31 of 31 rows of embed_tokens.weight are not those"),
        (odd(layers__0__self_attn__k_proj__weight=torch.ones(7, 16)), "24 rows of q_proj and 7 of k_proj"),
        (odd(model__fc__weight=torch.ones(16, 32)), "holds fc.weight twice"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, tensors, message):
    """Stops: a warm start from half a drafter, from another architecture, or for another target."""
    with pytest.raises(CoralError, match=message):
        eagle.read(write(tmp_path / "e", tensors), tiny_target())


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"num_attention_heads": 5}, "says 5 heads, which does not fit 24 rows"),
        ({"num_attention_heads": None}, r"config.json cannot be read"),
        ({"num_attention_heads": 0}, r"config.json cannot be read"),
        ({"hidden_act": "swosh"}, r"config.json cannot be read"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary type 'dynamic'; a drafter's must be"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rotary type 'yarn'; a drafter's must be"),
        ({"rope_scaling": "linear"}, r"config.json cannot be read"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(tmp_path, claims, message):
    """Stops: a traceback, or heads of the wrong width, from a config that is not the tensors'."""
    with pytest.raises(CoralError, match=message):
        eagle.read(write(tmp_path / "e", **claims), tiny_target())


def test_heads_that_fit_the_tensors_but_not_llama_are_refused(tmp_path):
    """Stops: a traceback from transformers, whose Llama has a hidden size that is a multiple of the heads."""
    names = ("layers__0__self_attn__k_proj__weight", "layers__0__self_attn__v_proj__weight")
    tensors = odd(**{name: torch.ones(8, 16) for name in names})  # 3 heads of 8, of which 1 has keys
    with pytest.raises(CoralError, match=r"config\.json cannot be read"):
        eagle.read(write(tmp_path / "e", tensors, num_attention_heads=3), tiny_target())


def test_files_that_cannot_be_read_are_refused(tmp_path):
    """Stops: code in a pickle that runs, and a traceback for half a file."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(CoralError, match="holds no drafter: neither one of ours"):
        eagle.read(tmp_path / "empty", tiny_target())
    directory = write(tmp_path / "e")
    (directory / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(CoralError, match=r"model\.safetensors cannot be read"):
        eagle.read(directory, tiny_target())
    (directory / "model.safetensors").unlink()
    torch.save({"fc.weight": replace}, directory / "pytorch_model.bin")  # a function, which could be any
    with pytest.raises(CoralError, match=r"pytorch_model\.bin cannot be read"):
        eagle.read(directory, tiny_target())
    torch.save({"epoch": 3}, directory / "pytorch_model.bin")
    with pytest.raises(CoralError, match="'epoch', which is no tensor"):
        eagle.read(directory, tiny_target())


def test_training_starts_from_an_eagle_directory_that_was_taken_in(tmp_path):
    """Stops: a warm start that keeps random weights, or another rotary base than the weights know."""
    target, directory = tiny_target(), write(tmp_path / "e", kind="bin")
    config = replace(CONFIG, drafter=DrafterOptions(init_drafter=str(directory)), limits=Limits(updates=1))
    with pytest.raises(CoralError, match="coral import"):
        new_drafter(target, config, tiny_data().dataset)
    source = eagle.read(directory, target).float()
    taken_in = DrafterOptions(init_drafter=str(tmp_path / "ours"))
    checkpoint.save(source, tmp_path / "ours", target=TargetRecord.of(target))
    config = replace(config, drafter=taken_in)
    started = new_drafter(target, config, tiny_data().dataset)
    rows, positions = torch.randn(2, 1, 5, 16), torch.arange(5)[None]
    assert started.config == replace(source.config, intermediate_size=24)  # the target's own width
    torch.testing.assert_close(started(*rows, positions), source(*rows, positions), rtol=1e-4, atol=1e-5)
    assert run(tmp_path / "o", config)[0].finished
    assert weights(tmp_path / "o")["layers.0.mlp.up_proj.weight"].shape == (24, 16)
    narrow = replace(config, drafter=replace(config.drafter, intermediate_size=8))
    with pytest.raises(CoralError, match="cannot start from a drafter"):
        new_drafter(target, narrow, tiny_data().dataset)
    with pytest.raises(CoralError, match="there is no drafter directory"):
        new_drafter(
            target, replace(CONFIG, drafter=DrafterOptions(init_drafter="/nowhere")), tiny_data().dataset
        )


def test_the_layouts_that_others_write_are_read(tmp_path):
    """Stops a refusal of shards with an index, vLLM's nested config, the target's own head, rotary tables."""
    expected = eagle.read(write(tmp_path / "plain"), tiny_target()).state_dict()
    head = tiny_target().head_weight.detach().half().clone()
    rotary = {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    whole = write(tmp_path / "whole", published() | rotary | {"lm_head.weight": head})
    (whole / "config.json").write_text(json.dumps({"model_type": "eagle", "model": CLAIMS}))
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "config.json").write_text(json.dumps(CLAIMS))
    names = sorted(published())
    files = {"model-1-of-2.safetensors": names[:3], "model-2-of-2.safetensors": names[3:]}
    for file, inside in files.items():
        save_file({name: published()[name].contiguous() for name in inside}, parts / file)
    index = parts / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: file for file, inside in files.items() for n in inside}}))
    for directory in (whole, parts):
        found = eagle.read(directory, tiny_target()).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    index.write_text(json.dumps({"weight_map": {"fc.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(CoralError, match=r"names \.\./elsewhere\.safetensors, which is not beside it"):
        eagle.read(parts, tiny_target())
    index.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(CoralError, match="weight_map cannot be read"):
        eagle.read(parts, tiny_target())
    other = write(tmp_path / "other", published() | {"lm_head.weight": head + 1})
    with pytest.raises(CoralError, match=r"31 of 31 rows of lm_head\.weight are not those of the target"):
        eagle.read(other, tiny_target())


def test_what_is_no_eagle_drafter_is_named(tmp_path):
    """Stops a list of tensors without a place, where one word says what a directory is."""
    weights, drafter = {"x": torch.ones(1)}, published()
    kinds = {
        "no place for: d2t": write(tmp_path / "3", drafter | {"d2t": torch.zeros(3)}),
        "Medusa heads": write(tmp_path / "m", weights, medusa_num_heads=3),
        "Medusa": write(tmp_path / "mt", {"medusa_heads.0.0.linear.weight": torch.ones(1)}),
        "a LoRA adapter": write(tmp_path / "l", {"layers.0.q_proj.lora_A.weight": torch.ones(1)}),
        "a whole language model": write(tmp_path / "w", {"model.layers.0.mlp.up_proj.weight": torch.ones(1)}),
    }
    gguf = tmp_path / "g"
    gguf.mkdir()
    (gguf / "model.gguf").write_bytes(b"GGUF")
    lora = tmp_path / "peft"
    lora.mkdir()
    (lora / "adapter_config.json").write_text("{}")
    hub = tmp_path / "hub"
    write(hub / "snapshots" / "01")
    more = {
        "a GGUF model, not": gguf,
        "a GGUF model, and": gguf / "model.gguf",
        "LoRA": lora,
        "hub's cache": hub,
    }
    for what, directory in (kinds | more).items():
        with pytest.raises(CoralError, match=what):
            read(directory, tiny_target())
