"""Other engines' formats: exactly the tensors and keys that they read, and back again bit by bit."""

import errno
import json
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_pair import save_target

from coral.drafters import checkpoint
from coral.drafters.feature.network import Drafter, DrafterConfig
from coral.drafters.heads import store as heads
from coral.export import write
from coral.export.read import read
from coral.target.record import TargetRecord
from coral.target.target import Target

LAYER = [
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm",
]  # fmt: skip
PLAIN = {"fc.weight", *(f"layers.0.{name}.weight" for name in LAYER)}
# What each engine reads, written out here once more: a table that is wrong in both places is wrong twice.
TENSORS = {
    "vllm": PLAIN,
    "sglang": PLAIN | {"fc.bias"},
    "eagle": PLAIN | {"embed_tokens.weight"},
}
CARRIES = {  # options that a drafter may have in a format
    "vllm": {"num_layers", "linear", "llama3", "yarn", "wide_heads"},
    "sglang": {"num_layers", "linear", "llama3", "yarn", "wide_heads", "fc_bias"},
    "eagle": {"num_layers", "linear", "gelu", "fc_bias"},
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
OPTIONS = {
    "num_layers": {"num_layers": 2},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "llama3": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN},
    "wide_heads": {"head_dim": 6},
    "gelu": {"hidden_act": "gelu"},
    "fc_bias": {"fc_bias": True},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Target:
    directory = tmp_path_factory.mktemp("t") / "target"
    save_target(directory)
    return Target.load(directory)


def make(directory: Path, target: Target, dtype=torch.float32, seed=3, **options) -> Path:
    """An untrained drafter on disk; heads of 4, so that they make up the hidden size, and no tensor is 0."""
    torch.manual_seed(seed)
    config = DrafterConfig.for_target(target.config, **{"head_dim": 4, **options})
    drafter = Drafter(config)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.normal_()
    checkpoint.save(drafter.to(dtype), directory, target=TargetRecord.of(target))
    return directory


def exported(directory: Path, to: str, target: Target, **options) -> Path:
    output = directory.with_name(f"{directory.name}-{to}")
    reads = target if write.FORMATS[to]["feature"].READS_TARGET else None
    write.export(directory, to, output, served="T", target=reads, **options)
    return output


def stored(directory: Path) -> dict[str, torch.Tensor]:
    if (directory / "pytorch_model.bin").exists():
        return torch.load(directory / "pytorch_model.bin", weights_only=True)
    return load_file(directory / "model.safetensors")


def config(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("to", TENSORS)
def test_a_directory_holds_what_its_engine_reads(to, target, tmp_path):
    """Stops: a tensor too few, which engines replace by random memory, or one too many, which they refuse."""
    directory = exported(make(tmp_path / "d", target), to, target)
    assert stored(directory).keys() == TENSORS[to]
    assert config(directory).keys() == write.FORMATS[to]["feature"].KEYS
    files = {path.name for path in directory.iterdir()}
    assert files == {"config.json", write.FORMATS[to]["feature"].FILE, "coral"}


def test_vllm_config(target, tmp_path):
    """Stops: `bias: true`, which vLLM takes for attention biases; rotary keys that some versions ignore."""
    directory = exported(make(tmp_path / "d", target, torch.bfloat16, **OPTIONS["llama3"]), "vllm", target)
    found = config(directory)
    assert found["architectures"] == ["LlamaForCausalLM"] and found["bias"] is False
    assert (found["vocab_size"], found["num_hidden_layers"]) == (target.config.vocab_size, 1)
    assert found["rope_parameters"] == LLAMA3 and found["rope_theta"] == 5e5
    assert found["rope_scaling"] == {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    assert found["tie_word_embeddings"] is False and found["torch_dtype"] == "bfloat16"
    assert found["max_position_embeddings"] == 512 and found["head_dim"] == 4


def test_sglang_gets_a_zero_bias(target, tmp_path):
    """Stops: a bias of random memory in a layer that always has one."""
    directory = exported(make(tmp_path / "d", target), "sglang", target)
    assert not stored(directory)["fc.bias"].any() and stored(directory)["fc.bias"].shape == (16,)
    assert config(directory)["architectures"] == ["LlamaForCausalLMEagle"]


def test_eagle_gets_the_embedding(target, tmp_path):
    """Stops: a strict load that fails, a bias that is made up since the key is missing, rotary keys that it
    refuses.
    """
    directory = exported(make(tmp_path / "d", target, **OPTIONS["linear"]), "eagle", target)
    embedding = target.model.get_input_embeddings().weight
    assert torch.equal(stored(directory)["embed_tokens.weight"], embedding)
    assert config(directory)["bias"] is False
    assert config(directory)["rope_scaling"] == {"type": "linear", "factor": 2.0}
    biased = exported(make(tmp_path / "b", target, fc_bias=True), "eagle", target)
    assert config(biased)["bias"] is True and "fc.bias" in stored(biased)


def as_speculators(directory: Path) -> Path:
    """A plain EAGLE directory under the names of the speculators library, whose converter writes them so."""
    names = {"fc": "fusion_fc"} | {f"layers.0.{name}": f"transformer.{name}" for name in LAYER}
    tensors = {
        f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": tensor
        for name, tensor in stored(directory).items()
    }
    save_file(tensors, directory / "model.safetensors")
    content = {"speculators_model_type": "eagle", "transformer_layer_config": config(directory)}
    (directory / "config.json").write_text(json.dumps(content))
    return directory


def test_speculators_is_read(target, tmp_path):
    """Stops: a drafter in that library's layout that is refused, or one whose bias or layer is lost."""
    made = make(tmp_path / "d", target, fc_bias=True, **OPTIONS["llama3"])
    back = read(as_speculators(exported(made, "sglang", target)), target)
    before = checkpoint.load(made)
    assert back.config == before.config
    assert all(torch.equal(t, before.state_dict()[name]) for name, t in back.state_dict().items())


def test_a_stored_dtype_can_be_asked_for(target, tmp_path):
    """Stops: a config that says another dtype than the tensors have."""
    directory = exported(make(tmp_path / "d", target), "sglang", target, dtype=torch.bfloat16)
    assert {t.dtype for t in stored(directory).values()} == {torch.bfloat16}
    assert config(directory)["dtype"] == config(directory)["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("to", TENSORS)
def test_what_a_format_keeps_comes_back_bit_by_bit(to, option, target, tmp_path):
    """Stops: a value that one of the two ways changes, in the tensors or in what they mean."""
    directory = make(tmp_path / "d", target, **OPTIONS[option])
    if option not in CARRIES[to]:
        with pytest.raises(checkpoint.CoralError, match=f"{to} cannot carry "):
            exported(directory, to, target)
        assert [*tmp_path.iterdir()] == [directory]
        return
    before, after = checkpoint.load(directory), read(exported(directory, to, target), target)
    assert after.config == before.config
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
    rows, positions = torch.randn(2, 1, 7, 16), torch.arange(7)[None]
    assert torch.equal(after(*rows, positions), before(*rows, positions))


@settings(max_examples=25, deadline=None)
@given(
    to=st.sampled_from([*TENSORS]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]),
    width=st.integers(1, 40),
    eps=st.sampled_from([1e-5, 1e-6, 0.1]),
    theta=st.sampled_from([1e4, 5e5, 123.25]),
    seed=st.integers(0, 9),
)
def test_any_plain_drafter_comes_back(to, dtype, heads, width, eps, theta, seed, target, tmp_path_factory):
    """Stops: sizes that are guessed, and a dtype that is rounded on one of the ways."""
    count, kv_count = heads
    sizes = {
        "num_attention_heads": count, "num_key_value_heads": kv_count, "head_dim": 16 // count,
        "intermediate_size": width, "rms_norm_eps": eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }  # fmt: skip
    directory = make(tmp_path_factory.mktemp("h") / "d", target, dtype, seed, **sizes)
    before, after = checkpoint.load(directory), read(exported(directory, to, target), target)
    assert after.config == before.config
    for name, tensor in before.state_dict().items():
        assert after.state_dict()[name].dtype == dtype and torch.equal(after.state_dict()[name], tensor)


@pytest.mark.parametrize("to", TENSORS)
def test_what_multiplies_the_embedding_goes_into_fc(to, target, tmp_path):
    """Stops: a drafter of Gemma that an engine gives rows of another size than it was trained with."""
    directory = make(tmp_path / "d", target, embedding_scale=4.0)
    before, after = checkpoint.load(directory), read(exported(directory, to, target), target)
    assert (before.config.embedding_scale, after.config.embedding_scale) == (4.0, 1.0)
    rows, positions = torch.randn(2, 1, 7, 16), torch.arange(7)[None]
    torch.testing.assert_close(after(*rows, positions), before(*rows, positions), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after(rows[0] * 4, rows[1], positions), before(*rows, positions), rtol=1e-2)


@pytest.mark.parametrize("to", TENSORS)
def test_normalised_feedback_is_refused_by_name(to, target, tmp_path):
    """Stops: a drafter that an engine runs without a part of it, and accepts little from."""
    directory = make(tmp_path / "d", target, normalised_feedback=True)
    with pytest.raises(checkpoint.CoralError, match=r"drafter\.normalised_feedback"):
        exported(directory, to, target)


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("vllm", OPTIONS["fc_bias"], "trained bias of fc"),
        ("vllm", OPTIONS["gelu"], "hidden_act 'gelu'"),
        ("vllm", OPTIONS["gelu"] | OPTIONS["fc_bias"], "hidden_act .* and the trained bias"),
        ("eagle", OPTIONS["llama3"], "rotary type 'llama3'"),
        ("eagle", OPTIONS["wide_heads"], "head_dim 6"),
        (
            "eagle",
            {"rope_parameters": OPTIONS["linear"]["rope_parameters"] | {"rope_theta": 7.0}},
            "rope_theta other",
        ),
        ("sglang", {"rope_parameters": {k: YARN[k] for k in list(YARN)[:3]}}, "'yarn' without original_max"),
    ],
)
def test_a_refusal_names_the_feature(to, options, message, target, tmp_path):
    """Stops: `cannot export` without the reason."""
    with pytest.raises(checkpoint.CoralError, match=message):
        exported(make(tmp_path / "d", target, **options), to, target)


def test_an_option_of_the_drafter_is_carried_or_refused():
    """Stops: a new option of the drafter that exports leave out without a word. Whoever adds one decides for
    each format whether it is carried or refused, and then adds it here.
    """
    assert {field.name for field in fields(DrafterConfig)} == {
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "vocab_size", "num_layers", "rms_norm_eps", "hidden_act", "rope_parameters",
        "max_position_embeddings", "normalised_feedback", "fc_bias", "embedding_scale",
    }  # fmt: skip


@pytest.mark.parametrize("to", TENSORS)
def test_a_drafter_with_another_tensor_is_refused(to, target, tmp_path, monkeypatch):
    """Stops: a directory of which a tensor is silently dropped or missing."""
    directory, format = make(tmp_path / "d", target), write.FORMATS[to]["feature"]
    made = format.tensors
    monkeypatch.setattr(format, "tensors", lambda *given: {**made(*given), "new.weight": torch.ones(1)})
    with pytest.raises(checkpoint.CoralError, match=r"differ in the tensors new\.weight"):
        exported(directory, to, target)
    monkeypatch.setattr(format, "tensors", lambda *given: dict([*made(*given).items()][1:]))
    with pytest.raises(checkpoint.CoralError, match="differ in the tensors"):
        exported(directory, to, target)
    assert [*tmp_path.iterdir()] == [directory]


def test_a_failed_export_leaves_what_was_there(target, tmp_path, monkeypatch):
    """Stops: half a directory, which an engine would load."""
    directory = make(tmp_path / "d", target)
    output = exported(directory, "vllm", target)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)  # behind the tensors
    for to in TENSORS:
        with pytest.raises(checkpoint.CoralError, match="No space left"):
            write.export(directory, to, output, served="T", target=target)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "d-vllm"]


def test_only_an_older_export_is_replaced(target, tmp_path):
    """Stops: an export over a drafter or a folder of someone's files."""
    directory = make(tmp_path / "d", target)
    output = exported(directory, "vllm", target)
    write.export(directory, "sglang", output, served="T")
    assert "fc.bias" in stored(output)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    for there in (directory, tmp_path / "other"):
        with pytest.raises(checkpoint.CoralError, match="holds files that are not an export"):
            write.export(directory, "vllm", there, served="T")
    assert checkpoint.load(directory)


# The command line.


@pytest.mark.parametrize(
    ("named", "directory"),
    [("models/Q2.5-0.5B.Q8_0.gguf", "Q2.5-0.5B.Q8_0-hf"), ("org/Q2.5-GGUF:Q4_K_M", "Q2.5-GGUF-Q4_K_M-hf")],
)
def test_a_gguf_target_is_converted_before_it_is_served(coral, models, tmp_path, named, directory):
    """Stops a command that no engine can run: they load Hugging Face directories."""
    drafter, output = models / "drafter", tmp_path / "e"
    lines = run(coral, "export", drafter, "--to", "vllm", "--output", output, "--target", named)
    assert lines[-2].split() == ["coral", "convert", named, directory]
    assert lines[-1].split()[:3] == ["vllm", "serve", directory]


def test_export_prints_the_command(coral, models, target, tmp_path):
    """Stops: a command with a placeholder, or with a path that means another directory elsewhere."""
    out = tmp_path / "for vllm"
    words = shlex.split(run(coral, "export", models / "drafter", "--to", "vllm", "--output", out)[-1])
    assert words[:3] == ["vllm", "serve", str(models / "target")]
    assert json.loads(words[4]) == {
        "method": "eagle", "model": str(out), "num_speculative_tokens": 4, "draft_tensor_parallel_size": 1,
    }  # fmt: skip
    lines = run(coral, "export", models / "drafter", "--to", "sglang", "--output", tmp_path / "s")
    assert lines[1].startswith("no token map: ") and "coral train-head" in lines[1]
    words = shlex.split(lines[-1])
    assert words[:5] == ["python", "-m", "sglang.launch_server", "--model-path", str(models / "target")]
    assert dict(zip(words[5::2], words[6::2], strict=True)) == {
        "--speculative-algorithm": "EAGLE", "--speculative-draft-model-path": str(tmp_path / "s"),
        "--speculative-num-steps": "6", "--speculative-eagle-topk": "8",
        "--speculative-num-draft-tokens": "16",
    }  # fmt: skip
    directory = make(tmp_path / "d", target)
    named = ("--target", models / "target")
    lines = run(coral, "export", directory, "--to", "eagle", "--output", tmp_path / "e", *named)
    compile("\n".join(lines[-2:]), "eagle", "exec")
    assert "use_eagle3=False" in lines[-1] and repr(str(tmp_path / "e")) in lines[-1]


def test_heads_go_along_or_are_named(coral, models, target, tmp_path):
    """Stops: a head that is missing in the engine without anyone being told; a token map of other ids."""
    directory = make(tmp_path / "d", target)
    ids = torch.tensor([5, 2, 200, 0])
    heads.save(directory, "static", {"ids": ids.int()})
    heads.save(directory, "routed", {"ids": torch.arange(270).view(10, 27).int()}, active=2)
    arguments = ("export", directory, "--target", models / "target", "--output")
    lines = run(coral, *arguments, tmp_path / "v", "--to", "vllm")
    assert "left out: heads (routed, static); vllm has no place" in lines[1]
    assert not (tmp_path / "v" / "token_map.pt").exists()
    lines = run(coral, *arguments, tmp_path / "s", "--to", "sglang")
    token_map = tmp_path / "s" / "token_map.pt"
    assert torch.load(token_map, weights_only=True) == ids.tolist()
    assert str(token_map) in lines[1] and "left out: heads (routed); sglang" in lines[2]
    assert lines[-1].endswith(f"--speculative-token-map {token_map}")
    (directory / "coral" / "heads" / "static.safetensors").write_bytes(b"cut off")
    result = coral(*arguments, tmp_path / "s", "--to", "sglang")
    assert result.code == 2 and "static.safetensors cannot be read" in result.err
    assert token_map.exists()


@pytest.mark.parametrize("to", TENSORS)
def test_an_import_writes_as_its_target_would(coral, models, target, tmp_path, to):
    """Stops: a drafter that is read but does not run: another target record, rotary base or dtype."""
    named = ("--target", models / "target")
    directory = make(tmp_path / "d", target)
    run(coral, "export", directory, "--to", to, "--output", tmp_path / "x", *named)
    lines = run(coral, "import", tmp_path / "x", *named, "--output", tmp_path / "back")
    assert lines[-1].endswith(f"coral generate --target {models / 'target'} --drafter {tmp_path / 'back'}")
    write_ = ("generate", "hi", *named, "--max-new-tokens", "6")
    assert run(coral, *write_, "--drafter", tmp_path / "back") == run(coral, *write_, "--drafter", "plain")
    ours = checkpoint.read_config(tmp_path / "back")
    assert ours["recipe"] == {"imported_from": str(tmp_path / "x")}


def test_a_published_drafter_is_imported(coral, models, target, tmp_path, monkeypatch):
    """Stops: the trained bias of published drafters that is dropped or refused; a config that is believed."""
    before = checkpoint.load(make(tmp_path / "d", target, torch.float16, fc_bias=True))
    published = tmp_path / "EAGLE-tiny"
    published.mkdir()
    embedding = target.model.get_input_embeddings().weight.detach().half()
    torch.save(before.state_dict() | {"embed_tokens.weight": embedding}, published / "pytorch_model.bin")
    claims = {"num_attention_heads": 4, "bias": False, "hidden_size": 999, "num_hidden_layers": 7}
    (published / "config.json").write_text(json.dumps(claims))
    monkeypatch.chdir(tmp_path)
    lines = run(coral, "import", published, "--target", models / "target")
    assert "float16, with the trained bias of its fc" in lines[0]
    after = checkpoint.load(tmp_path / "EAGLE-tiny-coral")
    assert after.config.fc_bias and torch.equal(after.fc.bias, before.fc.bias)
    engine = config(tmp_path / "EAGLE-tiny-coral")  # vLLM, which would drop the bias, does not know this one
    assert engine["architectures"] == ["LlamaForCausalLMEagle"] and engine["bias"] is False
    written = ("generate", "hi", "--target", models / "target", "--max-new-tokens", "6", "--drafter")
    assert run(coral, *written, tmp_path / "EAGLE-tiny-coral") == run(coral, *written, "plain")


MISTAKES = {
    "export {drafter} --to tensorrt --output {out}": "format 'tensorrt' is not known; use vllm, vllm-coral",
    "export {drafter} --to vllm --output {out} --dtype int8": "dtype 'int8' is not known; use auto",
    "export {target} --to vllm --output {out}": "is not a CORAL drafter",
    "export /nowhere --to vllm --output {out}": "there is no drafter directory /nowhere",
    "export {drafter} --to vllm --output {drafter}": "holds files that are not an export; choose an empty",
    "export {drafter} --to eagle --output {out}": "cannot carry head_dim 6",
    "export {plain} --to eagle --output {out} --target {other}": "has other weights",
    "export {drafter} --to vllm": "missing option '--output'",
    "import {drafter} --target {target} --output {out}": "is a CORAL drafter already",
    "import {target} --target {target} --output {out}": "holds a whole language model, not a drafter",
    "import /nowhere --target {target} --output {out}": "there is no drafter directory /nowhere",
    "import {unknown} --target /nowhere --output {out}": "there is no target directory /nowhere",
    "import {target} --target {target} --output {target}": "holds files that are not a drafter; choose",
    "import {unknown} --target {target} --output {out}": "rows of lm_head.weight are not those of the target",
    "import {layers} --target {target} --output {out}": "no transformer_layer_config",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(coral, models, target, tmp_path, line):
    """Stops: a traceback, or half a directory after one."""
    unknown = exported(make(tmp_path / "u" / "d", target), "vllm", target)
    tensors = stored(unknown) | {"lm_head.weight": torch.ones(270, 16)}
    torch.save(tensors, unknown / "pytorch_model.bin")
    (unknown / "model.safetensors").unlink()
    plain = make(tmp_path / "u" / "e", target)
    layers = as_speculators(exported(plain, "vllm", target))
    (layers / "config.json").write_text("{}")
    names = {name: models / name for name in ("target", "drafter", "other")}
    places = names | {"out": tmp_path / "out", "unknown": unknown, "layers": layers, "plain": plain}
    result = coral(*line.format(**places).split())
    assert result.code == 2 and result.out == "" and result.err.count("\n") == 1
    assert result.err.startswith("coral: ") and MISTAKES[line] in result.err, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["u"]


def test_help_teaches_what_each_format_is_for(coral):
    """Stops: formats that only their authors can tell apart."""
    text = coral("export", "--help").out
    for word in (*TENSORS, "token map", "embedding"):
        assert word in text


def run(coral, *arguments: object) -> list[str]:
    """The lines that a command prints, which must succeed."""
    result = coral(*arguments)
    assert result.code == 0, result.err
    return result.out.splitlines()


def test_what_a_foreign_drafter_cannot_be_is_said(coral, models, target, tmp_path):
    """Stops: a traceback for weights of whole numbers, and an error inside the brackets of another one."""
    directory = exported(make(tmp_path / "d", target), "vllm", target)
    line = ("import", directory, "--target", models / "target", "--output", tmp_path / "out")
    (directory / "config.json").write_text(json.dumps(config(directory) | {"num_attention_heads": -1}))
    assert "CoralError(" not in coral(*line).err and "says -1 heads" in coral(*line).err
    torch.save({n: t.to(torch.int8) for n, t in stored(directory).items()}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    result = coral(*line)
    assert result.code == 2 and "as torch.int8, which is no weight of a drafter" in result.err, result.err
    folder = tmp_path / "cache" / "models--me--eagle" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    result = coral("import", tmp_path / "cache", *line[2:])
    assert f"is a folder of the hub's cache; name the directory {folder}" in result.err, result.err
