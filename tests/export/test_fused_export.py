"""EAGLE-3 drafters for other engines, and from them: the names that they read, and back bit by bit."""

import json
import shlex
from dataclasses import fields

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_gguf import sentencepiece, write_gguf
from tiny_pair import save_target

from coral.drafters import checkpoint
from coral.drafters.eagle3.fused_network import FusedConfig, FusedDrafter
from coral.drafters.eagle3.fused_options import FusedOptions
from coral.drafters.eagle3.fused_start import new_drafter
from coral.errors import CoralError
from coral.export import llama_cpp, llama_cpp_target, write
from coral.export.read import read
from coral.target.record import TargetRecord
from coral.target.target import Target

LAYER = {f"midlayer.{name}.weight" for name in (
    "input_layernorm", "hidden_norm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj",
    "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}  # fmt: skip
PUBLISHED = LAYER | {"fc.weight", "norm.weight", "lm_head.weight"}
# llama.cpp's table, written out once more: a table that is wrong in both places is wrong twice.
GGUF = {
    "fc.weight": "fc.weight", "output_norm.weight": "norm.weight", "output.weight": "lm_head.weight",
    **{f"blk.0.{theirs}.weight": f"midlayer.{ours}.weight" for theirs, ours in (
        ("attn_norm", "input_layernorm"), ("attn_norm_2", "hidden_norm"), ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"), ("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"),
        ("ffn_norm", "post_attention_layernorm"), ("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"))},
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
ENGINES = ("vllm", "sglang", "eagle")


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Target:
    directory = tmp_path_factory.mktemp("t") / "target"
    save_target(directory, num_hidden_layers=8)
    return Target.load(directory)


def make(directory, target, dtype=torch.float32, layers=(2, 4, 5), draft_vocab_size=100, **options):
    """An untrained drafter on disk, of which no tensor is 0 or 1."""
    torch.manual_seed(3)
    sizes = {"head_dim": 4, "layers": layers, "draft_vocab_size": draft_vocab_size, **options}
    drafter = FusedDrafter(FusedConfig.for_target(target.config, **sizes))
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.normal_()
    drafter.draft_only(torch.randperm(target.vocab_size)[:draft_vocab_size].sort().values)
    checkpoint.save(drafter.to(dtype), directory, target=TargetRecord.of(target))
    return directory


def exported(directory, to):
    output = directory.with_name(f"{directory.name}-{to}")
    write.export(directory, to, output, served="T")
    return output


def stored(directory):
    if (directory / "pytorch_model.bin").exists():
        return torch.load(directory / "pytorch_model.bin", weights_only=True)
    return load_file(directory / "model.safetensors")


def told(directory):
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("to", ENGINES)
def test_a_directory_holds_what_its_engine_reads(to, target, tmp_path):
    """Stops a tensor that is left random, a stray d2t that vLLM refuses, layers off by one in either way of
    counting, a copy of the embedding.
    """
    directory = exported(make(tmp_path / "d", target), to)
    assert stored(directory).keys() == PUBLISHED | {"d2t", "t2d"}
    assert stored(exported(make(tmp_path / "all", target, draft_vocab_size=270), to)).keys() == PUBLISHED
    assert {path.name for path in directory.iterdir()} == {
        "config.json", "coral", "pytorch_model.bin" if to == "eagle" else "model.safetensors",
    }  # fmt: skip
    found = told(directory)
    assert found.keys() == write.FORMATS[to]["eagle3"].KEYS
    assert found["architectures"] == ["LlamaForCausalLMEagle3"] and found["draft_vocab_size"] == 100
    assert found["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]  # vLLM: what enters them
    assert found["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]  # SGLang: what leaves them
    for off in ("bias", "tie_word_embeddings", "norm_before_residual", "fc_norm", "norm_output"):
        assert found[off] is False
    ids = stored(directory)["d2t"] + torch.arange(100)
    assert stored(directory)["t2d"].nonzero().squeeze(1).equal(ids)  # offsets, and their mask


@pytest.mark.parametrize("options", [
    {}, {"draft_vocab_size": 270}, {"layers": (0, 3, 7)}, {"fc_norm": True}, {"norm_output": True},
    {"rope_parameters": LLAMA3}, {"head_dim": 6}, {"dtype": torch.bfloat16}], ids=str)  # fmt: skip
@pytest.mark.parametrize("to", ENGINES)
def test_what_a_format_keeps_comes_back_bit_by_bit(to, options, target, tmp_path):
    """Stops a value that one of the two ways changes, and an option that an engine would not compute."""
    directory = make(tmp_path / "d", target, **options)
    if to == "eagle" and options.keys() - {"draft_vocab_size", "dtype"}:
        with pytest.raises(CoralError, match="eagle cannot carry "):
            exported(directory, to)
        assert [*tmp_path.iterdir()] == [directory]
        return
    before, after = checkpoint.load(directory), read(exported(directory, to), target)
    assert after.config == before.config
    ours, theirs = before.state_dict(), after.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours
    )


def test_an_option_of_the_drafter_is_carried_or_refused():
    """Stops a new option that exports leave out without a word: decide for each format, then add it here."""
    assert {field.name for field in fields(FusedConfig)} == {
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "vocab_size", "rms_norm_eps", "hidden_act", "rope_parameters", "max_position_embeddings", "layers",
        "draft_vocab_size", "fc_norm", "norm_output",
    }  # fmt: skip


def test_the_commands_say_eagle3(target, tmp_path):
    """Stops `EAGLE` for such a drafter, which SGLang runs and accepts nothing from."""
    directory = make(tmp_path / "d", target)
    commands = {to: write.export(directory, to, tmp_path / to, served="T").command for to in ENGINES}
    assert json.loads(shlex.split(commands["vllm"])[4])["method"] == "eagle3"
    assert "--speculative-algorithm EAGLE3 " in commands["sglang"]
    assert "use_eagle3=True" in commands["eagle"]
    with pytest.raises(CoralError, match="vllm-coral cannot carry drafters of kind 'eagle3'; use vllm or"):
        write.export(directory, "vllm-coral", tmp_path / "o", served="T")


# Import.


def published(directory, target, change=lambda tensors: tensors, **claims):
    """A directory as SafeAILab has it, changed."""
    directory.mkdir()
    made = make(directory.with_name(f"{directory.name}-ours"), target, layers=(2, 4, 5))
    tensors = change(load_file(made / "model.safetensors"))
    save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "model.safetensors")
    content = {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "model_type": "llama",
        "hidden_act": "silu", "hidden_size": 16, "initializer_range": 0.02, "intermediate_size": 24,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1, "pretraining_tp": 1,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True,
        "transformers_version": "4.28.1", "vocab_size": 270, "draft_vocab_size": 100, **claims,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))
    return directory


def test_the_ways_in_which_others_publish_are_read(target, tmp_path):
    """Stops a prefix that is not known, layers that are guessed, a rotary base that is made up, a borrowed
    head of other ids than d2t's.
    """
    plain = read(published(tmp_path / "plain", target), target)
    assert plain.config.layers == (2, 4, 5) and plain.config.draft_vocab_size == 100
    assert plain.config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    embedding = target.model.get_input_embeddings().weight.detach().clone()
    same = {
        "specforge": ({"embed_tokens.weight": embedding}, {"eagle_config": {
            "use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 3, 4]}}),
        "qwen": ({}, {"max_window_layers": 36, "sliding_window": 131072, "use_sliding_window": False,
                      "target_model_type": "qwen2", "decoder_sparse_step": 1}),
        "vllm": ({}, {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}),
        "biased": ({"midlayer.self_attn.q_proj.bias": torch.zeros(16)}, {}),
    }  # fmt: skip
    for name, (more, claims) in same.items():
        found = read(published(tmp_path / name, target, lambda t, more=more: t | more, **claims), target)
        assert found.config == plain.config
        assert all(found.state_dict()[k].equal(v) for k, v in plain.state_dict().items())
    renamed = published(
        tmp_path / "automodel", target,
        lambda t: {f"model.{k.replace('midlayer.', 'layers.0.')}": v for k, v in t.items() if k != "t2d"}
        | {f"model.fc_norm.{i}.weight": torch.full((16,), 2.0 + i) for i in range(3)},
        norm_output=True, fc_norm=True,
    )  # fmt: skip
    found = read(renamed, target)
    assert found.config.fc_norm and found.config.norm_output and found.t2d.equal(plain.t2d)
    assert found.fc_norm[2].weight.eq(4).all()


def test_what_is_left_out_is_filled_in(target, tmp_path):
    """Stops an LM head of the wrong rows, and an order of ids that is lost where d2t is."""

    def without(*names):
        return lambda tensors: {name: t for name, t in tensors.items() if name not in names}

    found = read(published(tmp_path / "head", target, without("lm_head.weight")), target)
    assert found.lm_head.weight.equal(target.head_weight[found.ids])
    whole = read(published(tmp_path / "whole", target, without("lm_head.weight", "d2t", "t2d")), target)
    assert whole.lm_head.weight.equal(target.head_weight) and not hasattr(whole, "d2t")
    order, rows = torch.randperm(270), torch.randn(270, 16)
    mixed = published(tmp_path / "mixed", target, lambda t: without("t2d")(t) | {
        "lm_head.weight": rows, "d2t": order - torch.arange(270)})  # fmt: skip
    assert read(mixed, target).lm_head.weight[order].equal(rows)


def test_speculators_is_read(target, tmp_path):
    """Stops a config whose sizes lie one deeper, and its norm of the residual that would be dropped."""
    layer = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16, "vocab_size": 270,
             "rms_norm_eps": 1e-5, "rope_theta": 500.0, "model_type": "llama"}  # fmt: skip
    outer = {"speculators_model_type": "eagle3", "speculators_version": "0.9.0", "fc_norm": False,
             "transformer_layer_config": layer, "speculators_config": {"algorithm": "eagle3"}}  # fmt: skip
    gone = dict.fromkeys(("num_attention_heads", "vocab_size", "rms_norm_eps", "model_type"), "absent")
    rename = lambda t: {k.replace("midlayer.", "layers.0."): v for k, v in t.items()}  # noqa: E731
    found = read(
        published(tmp_path / "s", target, rename, **outer, **gone, norm_before_residual=False), target
    )
    assert found.config.rope_parameters["rope_theta"] == 500.0 and found.config.num_attention_heads == 4
    with pytest.raises(CoralError, match="norm_before_residual is True"):
        read(published(tmp_path / "r", target, rename, **outer, **gone, norm_before_residual=True), target)


@pytest.mark.parametrize(
    ("change", "claims", "message"),
    [
        ({"input_norm.weight": torch.ones(48)}, {}, "no place for: input_norm.weight"),
        ({"midlayer.self_attn.q_proj.bias": torch.ones(16)}, {}, "q_proj.bias is not zero"),
        ({"layers.1.mlp.up_proj.weight": torch.ones(24, 16)}, {}, "no place for: layers.1.mlp.up_proj"),
        ({"embed_tokens.weight": torch.ones(270, 16)}, {}, "rows of embed_tokens.weight are not those"),
        ({"fc.weight": torch.ones(16, 64)}, {}, "fc.weight reads 64 numbers, but three states"),
        ({"fc.weight": None}, {}, "lacks the tensors fc.weight of an EAGLE-3"),
        ({"d2t": None}, {}, "an LM head of 100 ids, and no d2t"),
        ({"d2t": torch.full((100,), 200)}, {}, "d2t does not name 100 of the target's 270 ids"),
        ({"t2d": torch.ones(270, dtype=torch.bool)}, {}, "t2d and d2t name different ids"),
        ({"fc.weight": torch.tensor(1.0)}, {}, "config.json cannot be read"),
        ({}, {"fc_norm": True}, "lacks the tensors fc_norm.0.weight"),
        ({}, {"eagle_config": [1]}, "config.json cannot be read"),
        ({}, {"norm_before_fc": True}, "norm_before_fc is True"),
        ({}, {"attention_bias": True}, "attention_bias is True"),
        ({}, {"use_sliding_window": True}, "use_sliding_window is True"),
        ({}, {"num_hidden_layers": 2}, "num_hidden_layers is 2"),
        ({}, {"vocab_size": 300}, "vocab_size is 300"),
        ({}, {"residual_multiplier": 0.5}, "it says residual_multiplier, which is not known here"),
        ({}, {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]},
              "eagle_aux_hidden_state_layer_ids": [2, 4, 5]}, "names two sets of layers"),
        ({}, {"eagle_aux_hidden_state_layer_ids": [2, 4, 8]}, "are not three of the target's 8"),
        ({}, {"eagle_aux_hidden_state_layer_ids": [2, 4]}, "are not three of the target's 8"),
    ],
)  # fmt: skip
def test_what_is_of_another_function_is_named(target, tmp_path, change, claims, message):
    """Stops a drafter that runs without a part of it, or with a key of its config passed over."""

    def changed(tensors):
        return {name: t for name, t in (tensors | change).items() if t is not None}

    with pytest.raises(CoralError, match=message):
        read(published(tmp_path / "p", target, changed, **claims), target)


def test_an_import_decodes_and_is_trained_on(coral, target, tmp_path):
    """Stops an import that is read, but neither drafts nor starts a run."""
    named = ("--target", target.name)
    result = coral("import", published(tmp_path / "p", target), *named, "--output", tmp_path / "ours")
    assert result.code == 0, result.err
    line = ("generate", "hi", *named, "--max-new-tokens", "6", "--drafter")
    assert coral(*line, tmp_path / "ours").out == coral(*line, "plain").out
    started = new_drafter(target, FusedOptions(init_drafter=str(tmp_path / "ours")), None, 0, None)
    assert started.config.layers == (2, 4, 5)
    assert started.fc.weight.equal(stored(tmp_path / "p")["fc.weight"])


# llama.cpp.


def gguf_target(directory, family="llama"):
    options = {} if family in ("llama", "phi3") else {"layer_types": ["full_attention"] * 8}
    model = tiny_model(family, num_hidden_layers=8, vocab_size=270, **options)
    return write_gguf(directory / "target.gguf", model, template="{{ messages }}"), Target(model, name="t")


@pytest.mark.parametrize("dtype", ["auto", *llama_cpp.DTYPES])
def test_a_gguf_file_holds_the_drafter(target, tmp_path, dtype):
    """Stops rows of query and key in Hugging Face's order, offsets in d2t, a layer off by one, a tokenizer
    that is lost: llama.cpp says nothing of any of these.
    """
    made = make(tmp_path / "d", target, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1,
                head_dim=16)  # fmt: skip
    served = llama_cpp_target.find(target.name)
    llama_cpp.export(made, tmp_path / "e.gguf", served, dtype)
    reader, drafter = GGUFReader(tmp_path / "e.gguf"), checkpoint.load(made)
    ours = drafter.state_dict()
    assert {t.name for t in reader.tensors} == GGUF.keys() | {"d2t"}
    for tensor in reader.tensors:
        if tensor.name == "d2t":
            assert tensor.data.dtype == np.int64 and tensor.data.tolist() == drafter.ids.tolist()
            continue
        expected = ours[GGUF[tensor.name]]
        if heads := {"blk.0.attn_q.weight": 2, "blk.0.attn_k.weight": 1}.get(tensor.name):
            order = torch.arange(16).view(2, 8).T.flatten()  # 0 8 1 9 ...
            expected = torch.cat([part[order] for part in expected.chunk(heads)])
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type))).view(expected.shape)
        exact = dtype in ("auto", "f32") or expected.dim() == 1
        close = {"q8_0": 0.05, "bf16": 0.02, "f16": 0.002}.get(dtype, 0.0)
        torch.testing.assert_close(values, expected, rtol=0 if exact else 1e-2, atol=0 if exact else close)
        kind = {"auto": "F32", "q8_0": "Q8_0" if expected.shape[-1] % 32 == 0 else "BF16"}
        wanted = "F32" if expected.dim() == 1 else kind.get(dtype, dtype.upper())
        assert tensor.tensor_type.name == wanted, tensor.name
    field = lambda key: reader.fields[key].contents()  # noqa: E731
    assert field("general.architecture") == "eagle3" and field("eagle3.target_layers") == [2, 4, 5]
    assert field("eagle3.target_hidden_size") == 16 and field("eagle3.block_count") == 1
    assert field("eagle3.vocab_size") == 270 == len(field("tokenizer.ggml.tokens"))
    assert field("eagle3.norm_before_fc") is False and field("eagle3.attention.key_length") == 16
    assert field("tokenizer.ggml.eos_token_id") == 2 and field("tokenizer.ggml.model") == "gpt2"


def test_the_tokenizer_is_the_targets_own(target, tmp_path):
    """Stops ids of another length than the embedding, and a file of a target whose tokenizer is changed."""
    path, loaded = gguf_target(tmp_path)
    made = make(tmp_path / "d", loaded, rope_parameters=LLAMA3)
    served = llama_cpp_target.find(str(path))
    llama_cpp.export(made, tmp_path / "e.gguf", served)
    own, copied = GGUFReader(path), GGUFReader(tmp_path / "e.gguf")
    keys = [key for key in own.fields if key.startswith("tokenizer.")]
    assert len(keys) > 5 and all(
        own.fields[key].contents() == copied.fields[key].contents()
        and own.fields[key].types == copied.fields[key].types
        for key in keys
    )
    (divisors,) = (t.data for t in copied.tensors if t.name == "rope_freqs.weight")
    assert divisors[0] == 1 and divisors[-1] == 8 and divisors.dtype == np.float32
    from_hf = llama_cpp_target.find(target.name)
    assert from_hf.keys["tokenizer.ggml.merges"][:2] == ["t h", "th e"]
    assert from_hf.keys["tokenizer.ggml.token_type"][:7] == [3] * 6 + [1]
    words = sentencepiece()
    size = len(words["tokens"])
    model = tiny_model("llama", num_hidden_layers=8, vocab_size=size)
    file = write_gguf(tmp_path / "s.gguf", model, words)
    coral_made = Target.load(file).tokenizer
    found = llama_cpp_target.tokenizer_keys(coral_made, size, "s")
    assert found["tokenizer.ggml.tokens"] == words["tokens"]
    assert found["tokenizer.ggml.token_type"] == words["token_type"]
    assert found["tokenizer.ggml.model"] == "llama"


def test_what_llama_cpp_cannot_do_is_refused(target, tmp_path):
    """Stops a llama-server that ends the process, or drafts with a part of the drafter missing."""
    served, output = llama_cpp_target.find(target.name), tmp_path / "e.gguf"
    refused = {
        "drafter.fc_norm": {"fc_norm": True}, "drafter.norm_output": {"norm_output": True},
        "hidden_act 'gelu'": {"hidden_act": "gelu"},
        "rotary type 'linear'": {"rope_parameters": {
            "rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    }  # fmt: skip
    for i, (message, options) in enumerate(refused.items()):
        with pytest.raises(CoralError, match=message):
            llama_cpp.export(make(tmp_path / f"d{i}", target, **options), output, served)
    made = make(tmp_path / "d", target)
    for family in ("qwen2", "gemma3", "phi3"):
        path, _ = gguf_target(tmp_path, family)
        with pytest.raises(CoralError, match=f"no EAGLE-3 for {family} models such as .*; export to vllm"):
            llama_cpp.export(made, output, llama_cpp_target.find(str(path)))
    save_target(tmp_path / "shallow", num_hidden_layers=5)
    save_target(tmp_path / "wide", num_hidden_layers=8, hidden_size=32)
    for other, message in (
        ("shallow", r"layers \[2, 4, 5\], but .*shallow has 5"),
        ("wide", "hidden_size is 16"),
    ):
        with pytest.raises(CoralError, match=message):
            llama_cpp.export(made, output, llama_cpp_target.find(str(tmp_path / other)))
    (tmp_path / "foreign.gguf").write_bytes(path.read_bytes())
    for odd, message in (
        (tmp_path / "dir", "reads one file"),
        (tmp_path / "foreign.gguf", "is not an export"),
    ):
        with pytest.raises(CoralError, match=message):
            llama_cpp.export(made, odd, served)
    with torch.no_grad():
        big = checkpoint.load(made)
        big.fc.weight[0, 0] = 1e6
    checkpoint.save(big, tmp_path / "big", target=TargetRecord.of(target))
    with pytest.raises(CoralError, match="numbers beyond float16"):
        llama_cpp.export(tmp_path / "big", output, served, "f16")
    assert not output.exists() and not [*tmp_path.glob(".e.gguf*")]
    llama_cpp.export(made, output, served)
    llama_cpp.export(made, output, served, "q8_0")  # over an older one


def test_the_command_line_writes_and_says_how_to_serve(coral, target, tmp_path):
    """Stops a command with a placeholder, a dtype of another format, a drafter of features."""
    made, output = make(tmp_path / "d", target), tmp_path / "e.gguf"
    line = ("export", made, "--to", "llama.cpp", "--output", output)
    result = coral(*line, "--dtype", "q8_0")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    model = f"{target.name.rsplit('/')[-1]}.gguf"
    assert lines[-2] == f"python convert_hf_to_gguf.py {target.name} --outfile {model}"
    assert shlex.split(lines[-1]) == [
        "llama-server", "-m", model, "-md", str(output), "--spec-type", "draft-eagle3",
        "--spec-draft-n-max", "4",
    ]  # fmt: skip
    assert "--no-spec-draft-backend-sampling" in result.out
    path, _ = gguf_target(tmp_path)
    assert f"-m {path} -md" in coral(*line, "--target", path).out.splitlines()[-1]
    assert "dtype 'float32' is not known; use auto, f32" in coral(*line, "--dtype", "float32").err
    assert "llama.cpp" in coral("export", "--help").out
