"""GGUF files as targets: the weights, config and tokenizer that llama.cpp has, or a refusal that says why."""

from __future__ import annotations

import math
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import SHAPE
from tiny_gguf import HARD, byte_level, laid_out, sentencepiece, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from coral.errors import CoralError
from coral.target import default as models
from coral.target.gguf import weights
from coral.target.gguf.cache import load_tokenizer
from coral.target.gguf.convert import convert
from coral.target.gguf.file import read
from coral.target.gguf.rope import llama3_divisors
from coral.target.gguf.tokenizer import read_tokenizer

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])
SIZES = SHAPE | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 24}
PARTIAL = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 12}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "phi3": ("phi3", {"sliding_window": 7}),
    "phi3, partial": ("phi3", {"sliding_window": None, "rope_parameters": PARTIAL}),
    "olmo2": ("olmo2", {}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "num_hidden_layers": 7, "sliding_window": 5,
                               "query_pre_attn_scalar": 16}),
}  # fmt: skip
KEYS: dict[str, dict[str, Any]] = {
    "phi3": {".attention.sliding_window": 7},
    "gemma3": {".attention.sliding_window": 5},
}


def model_of(kind: str, **changes: Any) -> PreTrainedModel:
    """Random weights, norms and biases, too."""
    family, sizes = KINDS[kind]
    torch.manual_seed(5)
    config = AutoConfig.for_model(family, **{**SIZES, **sizes, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def converted(path: Path, dtype: str = "float32") -> Path:
    convert([path], path.parent / f"as-{dtype}", dtype)
    return path.parent / f"as-{dtype}"


def logits(source: Any) -> torch.Tensor:
    model = source if isinstance(source, PreTrainedModel) else AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_computes_what_it_did(kind: str, tmp_path: Path) -> None:
    """Stops rows of query and key that are left in llama.cpp's order, norms that are off by one, lost biases
    and windows, and a head that is tied where it is not.
    """
    model = model_of(kind)
    path = write_gguf(tmp_path / "m.gguf", model, keys=KEYS.get(kind))
    torch.testing.assert_close(logits(converted(path)), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantised", ["Q8_0", "Q4_0", "Q5_1", "BF16", "F16"])
def test_float32_is_exact_and_other_dtypes_round_it(quantised: str, tmp_path: Path) -> None:
    """Stops values that are rounded twice, and matrices that are dequantised as another type."""
    path = write_gguf(tmp_path / "m.gguf", model_of("qwen2"), quantised=quantised)
    exact = load_file(converted(path) / "model.safetensors")
    rounded = load_file(converted(path, "bfloat16") / "model.safetensors")
    halved = load_file(converted(path, "float16") / "model.safetensors")
    theirs = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    name = "blk.1.ffn_down.weight" if quantised in ("BF16", "F16") else "blk.1.ffn_up.weight"
    ours = f"model.layers.1.mlp.{name.split('_')[1].split('.')[0]}_proj.weight"
    assert np.array_equal(exact[ours].numpy(), theirs[name].reshape(exact[ours].shape))
    for key, values in exact.items():
        assert torch.equal(rounded[key], values.to(torch.bfloat16)), key
        assert torch.equal(halved[key], values.to(torch.float16)), key


def test_memory_is_that_of_a_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops a conversion that holds the whole model, or a whole tensor in float32."""
    model = model_of("qwen2", vocab_size=40_000, tie_word_embeddings=True)
    path = write_gguf(tmp_path / "m.gguf", model, byte_level("qwen2"), quantised="Q8_0")
    file = read([path])
    monkeypatch.setattr(weights, "_CHUNK", 1 << 15)
    placed = weights.place(file, model.config)
    kept = torch.get_num_threads()
    tracemalloc.start()
    try:
        weights.write_weights(file, placed, model.config, torch.float32, tmp_path / "w.safetensors")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert kept == torch.get_num_threads()
    assert peak < 40_000 * 32 * 4 / 4, peak  # a quarter of the embedding in float32
    assert torch.equal(
        load_file(tmp_path / "w.safetensors")["model.embed_tokens.weight"],
        torch.from_numpy(
            gguf.dequantize(file.tensors["token_embd.weight"].packed(), gguf.GGMLQuantizationType.Q8_0)
        ),
    )


def test_the_directory_is_a_plain_one(tmp_path: Path) -> None:
    """Stops a directory that transformers takes for a quantised model, and ends that are lost."""
    tokens = byte_level("llama-bpe")
    tokens |= {"eot_token_id": tokens["tokens"].index("<|eot_id|>"), "padding_token_id": 0}
    model = model_of("llama", vocab_size=len(tokens["tokens"]))
    directory = converted(write_gguf(tmp_path / "m.gguf", model, tokens, template="{{ messages }}"), "auto")
    config = AutoConfig.from_pretrained(directory)
    assert not hasattr(config, "quantization_config") and config.dtype == torch.bfloat16
    assert config.architectures == ["LlamaForCausalLM"] and config.rms_norm_eps == 1e-6
    ends = [2, 4, 0]  # eos, eot, then <|endoftext|> by its name; <|im_end|> is eos already
    assert GenerationConfig.from_pretrained(directory).eos_token_id == ends
    assert AutoTokenizer.from_pretrained(directory).chat_template == "{{ messages }}"
    again = AutoModelForCausalLM.from_pretrained(directory)
    again.save_pretrained(tmp_path / "again")


def test_named_templates_are_kept(tmp_path: Path) -> None:
    keys = {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "tools"}
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"), keys=keys, template="plain")
    found = AutoTokenizer.from_pretrained(converted(path)).chat_template
    assert found == {"default": "plain", "tool_use": "tools"}


# --- RoPE


@pytest.mark.parametrize(
    "scaling", [LLAMA3, YARN, {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}]
)
def test_scaled_positions_are_restored(scaling: dict[str, Any], tmp_path: Path) -> None:
    """Stops a model of long contexts from becoming one of short ones: transformers drops all of these."""
    model = model_of("llama", rope_parameters=dict(scaling), head_dim=32, max_position_embeddings=96)
    keys: dict[str, Any] = {".rope.scaling.type": scaling["rope_type"]}
    keys[".rope.scaling.factor"] = scaling["factor"]
    tensors = {}
    if scaling is LLAMA3:
        inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
        plain = 100.0 ** (-torch.arange(16) / 16)
        tensors["rope_freqs.weight"] = (plain / inverse).numpy().astype(np.float32)
        keys = {".rope.scaling.original_context_length": 32}
    if scaling is YARN:
        keys |= {".rope.scaling.original_context_length": 24, ".rope.scaling.finetuned": True}
    path = write_gguf(tmp_path / "m.gguf", model, keys=keys, tensors=tensors)
    directory = converted(path)
    assert AutoConfig.from_pretrained(directory).rope_parameters == scaling
    torch.testing.assert_close(logits(directory), logits(model), rtol=1e-5, atol=1e-5)


def test_longrope_is_restored(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.2, 1.5, 1.75],
            "long_factor": [2.0, 4.0, 7.5, 9.0], "original_max_position_embeddings": 34}  # fmt: skip
    model = model_of("phi3", rope_parameters=rope, original_max_position_embeddings=34, sliding_window=None)
    tensors = {
        f"rope_factors_{n}.weight": np.array(rope[f"{n}_factor"], np.float32) for n in ("short", "long")
    }
    keys = {".rope.scaling.original_context_length": 34, ".rope.scaling.attn_factor": 1.2}
    path = write_gguf(tmp_path / "m.gguf", model, keys=keys, tensors=tensors)
    found = AutoConfig.from_pretrained(converted(path)).rope_parameters
    assert {key: found[key] for key in rope} == rope
    assert math.isclose(found["attention_factor"], 1.2, rel_tol=1e-6)


@given(
    factor=st.sampled_from([2.0, 8.0, 16.0, 32.0]),
    low=st.floats(0.5, 4.0),
    width=st.floats(1.0, 8.0),
    theta=st.sampled_from([1e4, 5e5, 1e6]),
    count=st.sampled_from([32, 64]),
)
def test_llama3_is_solved_exactly(factor: float, low: float, width: float, theta: float, count: int) -> None:
    """Stops parameters that only resemble those of the divisors. One frequency between the two wavelengths
    would not determine them.
    """
    from coral.target.gguf import rope

    divisors = llama3_divisors(theta, count, 8192, factor, low, low + width).astype(np.float32)
    assume(((divisors > 1) & (divisors < 0.999 * factor)).sum() > 1)
    file: Any = type("File", (), {"name": "m.gguf", "tensors": {}})()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rope, "_divisors", lambda *_: divisors.astype(np.float64))
        found = rope._llama3(file, theta, 8192)
    again = llama3_divisors(
        theta, count, 8192, found["factor"], found["low_freq_factor"], found["high_freq_factor"]
    )
    assert np.allclose(again, divisors, rtol=2e-5)


@pytest.mark.parametrize(
    ("keys", "divisors", "reason"),
    [
        ({}, [1, 2, 1, 8], "Llama 3's for no parameters"),
        ({".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0}, [1, 1, 8, 8], "scales RoPE twice"),
        ({".rope.scaling.type": "longrope"}, None, "as 'longrope'"),
        ({".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0, ".rope.scaling.attn_factor": 0.5}, None,
         "llama.rope.scaling.attn_factor"),
    ],
)  # fmt: skip
def test_scaling_that_cannot_be_restored_is_refused(keys, divisors, reason, tmp_path: Path) -> None:
    tensors = {} if divisors is None else {"rope_freqs.weight": np.array(divisors, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"), keys=keys, tensors=tensors)
    with pytest.raises(CoralError, match=reason):
        convert([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- tokenizers


def tokenizer_of(name: str, directory: Path) -> Any:
    tokens = sentencepiece() if name == "spm" else byte_level(name)
    model = model_of("qwen2", vocab_size=len(tokens["tokens"]))  # AutoTokenizer rebuilds those of Qwen2
    return load_tokenizer(converted(write_gguf(directory / "m.gguf", model, tokens)), name)


@pytest.mark.parametrize("name", HARD["tiny"])
def test_tokens_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    """Stops texts that are split as another model's, and tokens around them that are lost or added."""
    tokenizer, expected = tokenizer_of(name, tmp_path), HARD["tiny"][name]
    for text, ids, framed in zip(
        HARD["texts"], expected["ids"], [*expected["framed"], *[None] * 99], strict=False
    ):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text
        assert framed is None or tokenizer(text)["input_ids"] == framed, text
        assert name == "spm" or tokenizer.decode(ids) == text


def real_files() -> dict[str, Path]:
    """The models that were fetched for use, by the names they give themselves."""
    found = {}
    for path in models.directory().rglob("*.gguf"):
        found[str(read([path]).metadata.get("general.name"))] = path
    return found


@pytest.mark.real
@pytest.mark.parametrize("name", HARD["real"])
def test_tokens_of_real_models_are_those_of_llama_cpp(name: str) -> None:
    """One difference: b11549 takes Qwen's ordinary `</s>` for a control token, as it is in other models."""
    if (path := real_files().get(name)) is None:
        pytest.skip(f"{name} is not in {models.directory()}")
    tokenizer, expected = read_tokenizer(read([path])), HARD["real"][name]
    for text, ids in zip(HARD["texts"], expected["ids"], strict=True):
        if text != "<s>x</s>" or not name.startswith("Qwen"):
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text
    for text, ids in zip(HARD["texts"], expected["framed"], strict=False):
        assert tokenizer(text)["input_ids"] == ids, text
    for messages, text in zip(HARD["conversations"], expected.get("chats", ()), strict=False):
        shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert shown == text


@pytest.mark.parametrize(
    ("tokens", "changes", "begin", "end"),
    [
        ("qwen2", {}, [], []),
        ("qwen2", {"add_bos_token": True}, [1], []),
        ("llama-bpe", {}, [1], []),
        ("llama-bpe", {"add_bos_token": False}, [], []),
        ("qwen2", {"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ("spm", {"add_bos_token": False}, [], []),
    ],
)
def test_tokens_around_a_text(tokens: str, changes: dict[str, Any], begin, end, tmp_path: Path) -> None:
    """Stops a prompt without the token that the model was trained to begin with."""
    vocabulary = (sentencepiece() if tokens == "spm" else byte_level(tokens)) | changes
    model = model_of("llama", vocab_size=len(vocabulary["tokens"]))
    path = write_gguf(tmp_path / "m.gguf", model, vocabulary)
    built, loaded = read_tokenizer(read([path])), AutoTokenizer.from_pretrained(converted(path))
    for tokenizer in (built, loaded):
        plain = tokenizer("Hello", add_special_tokens=False)["input_ids"]
        assert tokenizer("Hello")["input_ids"] == [*begin, *plain, *end]


def test_an_unknown_split_is_said_once(tmp_path: Path) -> None:
    tokens = byte_level("of-tomorrow", ["ab"])
    path = write_gguf(tmp_path / "m.gguf", model_of("llama", vocab_size=len(tokens["tokens"])), tokens)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        converted(path)
    assert len(said) == 1 and "'of-tomorrow', which is not known" in str(said[0].message)


# --- what is refused


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "mamba"}, "architecture 'mamba', which is not supported.*llama, qwen2"),
    "experts": ({"keys": {".expert_count": 8}}, r"llama.expert_count = 8, where only 0"),
    "unknown key": ({"keys": {".logit_scale": 0.5}}, r"llama.logit_scale, which is not known"),
    "unknown tensor": ({"tensors": {"blk.0.ffn_gate_inp.weight": np.ones((2, 32), np.float32)}},
                       r"without a place in a llama model: blk.0.ffn_gate_inp.weight"),
    "missing tensor": ({"tensors": {"blk.1.ffn_up.weight": None}}, r"lacks tensors.*layers.1.mlp.up_proj"),
    "lost bias": ({"tensors": {"blk.0.attn_q.bias": np.ones(32, np.float32)}}, r"lacks tensors.*k_proj.bias"),
    "shape": ({"keys": {".feed_forward_length": 99}}, r"has shape \(24, 32\).*describes has \(99, 32\)"),
    "layers that differ": ({"keys": {".attention.head_count_kv": [2, 4]}}, "differs from layer to layer"),
    "no key": ({"keys": {".block_count": None}}, "lacks 'block_count'"),
    "rotated part": ({"keys": {".rope.dimension_count": 4}}, "rotates 4 of 8 dimensions"),
    "adapter": ({"keys": {"general.type": "adapter"}}, "a LoRA adapter"),
    "tokenizer": ({"tokenizer": byte_level("qwen2", []) | {"model": "bert"}}, "tokenizer of kind 'bert'"),
    "tokenizer key": ({"keys": {"tokenizer.ggml.suppress_tokens": [1]}}, "tokenizer.ggml.suppress_tokens"),
    "same token twice": ({"tokenizer": byte_level("qwen2", []) | {"tokens": ["a", "a"]}}, "same token twice"),
    "too many tokens": ({"tokenizer": byte_level("qwen2")}, "tokens, but embeddings of 31"),
    "parts": ({"keys": {"split.count": 3, "split.no": 1}}, "says that it is part 2 of 3"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_exactly_is_refused(what: str, tmp_path: Path) -> None:
    """Stops a model with another function, made in silence."""
    changes, reason = REFUSED[what]
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"), **changes)
    with pytest.raises(CoralError, match=reason):
        convert([path], tmp_path / "out")
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", model_of("llama"), tensors={"output_norm.weight": np.full(32, 1e6, np.float32)}
    )
    with pytest.raises(CoralError, match=r"model.norm.weight holds values beyond float16"):
        convert([path], tmp_path / "out", "float16")
    converted(path)


@pytest.mark.parametrize("keep", [3, 100, 2000, -1])
def test_damaged_files(keep: int, tmp_path: Path) -> None:
    """Stops a traceback, and weights that are read from beyond the end."""
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CoralError, match=r"no GGUF file|damaged|cut short"):
        read([path])
    path.write_bytes(b"PK" + bytes(100))
    with pytest.raises(CoralError, match="does not begin with GGUF"):
        read([path])


def test_metadata_are_those_of_gguf_py(tmp_path: Path) -> None:
    """The reader's slow twin."""
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"), byte_level("qwen2"), quantised="Q8_0")
    ours, theirs = read([path]), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    plain = {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in ours.metadata.items()
    }
    assert plain == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.type == tensor.tensor_type and list(mine.shape) == tensor.shape.tolist()[::-1]
        assert mine.packed().tobytes() == tensor.data.tobytes()


def test_files_in_parts(tmp_path: Path) -> None:
    """Stops a target that lacks the layers of every part but the first."""
    model = model_of("llama")
    names = list(laid_out(model, "llama"))
    paths = []
    for part in range(2):
        gone = {name: None for i, name in enumerate(names) if (i < 8) == bool(part)}
        keys = {"split.no": part, "split.count": 2, "split.tensors.count": len(names)}
        paths.append(write_gguf(tmp_path / f"m-0000{part + 1}-of-00002.gguf", model, keys=keys, tensors=gone))
    convert(paths, tmp_path / "out", "float32")
    assert torch.equal(logits(tmp_path / "out"), logits(model))
    with pytest.raises(CoralError, match="says that it is part 2 of 2, but it is used as part 1"):
        read(paths[::-1])
