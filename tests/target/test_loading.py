"""A target is what its checkpoint says, whole, or it is refused with the names of what is wrong."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pair import save_target

from coral.api import load
from coral.errors import CoralError

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original")
    save_target(directory)
    return directory


@pytest.fixture
def target(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "target")
    return tmp_path / "target"


def edit(target: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_tensor_is_named(target: Path) -> None:
    """Stops random weights in place of what a checkpoint lacks, and the other text that they write."""
    edit(target, lambda tensors: tensors.pop(UP))
    with pytest.raises(CoralError, match=f"it lacks {re.escape(UP)}, so its text would be another one"):
        load(target)


def test_a_missing_head_is_none_of_a_tied_model(target: Path) -> None:
    """Stops a refusal of the many checkpoints whose head is their embedding."""
    edit(target, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CoralError, match=r"it lacks lm_head\.weight"):
        load(target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    pair = load(target)
    assert torch.equal(pair.target.head_weight, pair.target.embedding_weight)


def test_a_tensor_without_a_place_is_named(target: Path) -> None:
    """Stops a bias, or a second branch, that the model was trained with and ours would leave out."""
    name = "model.layers.0.self_attn.q_proj.bias"
    edit(target, lambda tensors: tensors.update({name: torch.ones(24)}))
    with pytest.raises(CoralError, match=f"it holds without a place in the model {re.escape(name)}"):
        load(target)


def test_known_buffers_are_no_weights(target: Path) -> None:
    """Stops a refusal of older checkpoints, which hold rotary frequencies."""
    rotary = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(2)}
    edit(target, lambda tensors: tensors.update(rotary))
    assert load(target)


def test_another_shape_is_named(target: Path) -> None:
    """Stops a traceback of transformers, or half a weight."""
    edit(target, lambda tensors: tensors.update({UP: torch.ones(25, 16)}))
    with pytest.raises(CoralError, match=f"it holds in other shapes {re.escape(UP)}"):
        load(target)


def test_a_lost_shard_and_an_index_that_lies(target: Path) -> None:
    """Stops the same where weights lie in several files."""
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for part, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, target / part, metadata={"format": "pt"})
    index = {name: part for part, inside in parts.items() for name in inside}
    path = target / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert load(target)
    save_file(
        {name: tensors[name] for name in names[10:]},
        target / "model-2.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(CoralError, match=re.escape(names[9])):
        load(target)
    (target / "model-2.safetensors").unlink()
    with pytest.raises(CoralError, match=r"model-2\.safetensors"):
        load(target)


@pytest.mark.parametrize("size", [0, 7, 100, 5000])
def test_a_truncated_file_is_a_sentence(target: Path, size: int) -> None:
    """Stops a traceback of safetensors."""
    path = target / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CoralError, match="cannot load the target"):
        load(target)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_called_one(target: Path, name: str) -> None:
    """Stops "header too large", which nobody takes for a clone without its large files."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 28197304\n"
    (target / name).write_text(pointer)
    with pytest.raises(CoralError, match=rf"{name} is a git-lfs pointer, .*\(run `git lfs pull` there\)"):
        load(target)


def test_what_is_no_model_is_named(target: Path, tmp_path: Path) -> None:
    """Stops "no such file" for a directory that plainly holds something else."""
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text("{}")
    with pytest.raises(CoralError, match="holds a LoRA adapter, not a model; merge it"):
        load(lora)
    snapshot = tmp_path / "hub" / "models--me--mine" / "snapshots" / "0123"
    shutil.copytree(target, snapshot)
    for folder in (tmp_path / "hub", tmp_path / "hub" / "models--me--mine"):
        with pytest.raises(CoralError, match=f"is a folder of the hub's cache.*{snapshot}"):
            load(folder)
    assert load(snapshot)


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"model_type": 3}', '{"num_attention_heads": 0}', "\x00\xff"]
)
def test_foreign_files_that_are_damaged(target: Path, file: str, content: str) -> None:
    """Stops a traceback of transformers or tokenizers, which raise what they like."""
    (target / file).write_bytes(content.encode("latin-1"))
    try:
        load(target)
    except CoralError as error:
        assert str(error).endswith(".")


@pytest.mark.parametrize("content", ['{"model": {"type": "Nope"}}', '{"version": "1.0"}', "", '{"a'])
def test_a_damaged_tokenizer_is_a_sentence(target: Path, content: str, coral, tmp_path: Path) -> None:
    """Stops a traceback of tokenizers, and a message that blames the name."""
    (target / "tokenizer.json").write_text(content)
    line = ("data", "prepare", "x.jsonl", "--tokenizer", target, "--output", tmp_path / "out")
    told = coral(*line)
    assert told.code == 2 and "check its files" in told.err, told.err
    assert "tokenizer.json is no JSON" in told.err or content.endswith("}")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"null", b"\xff"])
def test_a_damaged_config_is_named(target: Path, name: str, content: bytes) -> None:
    """Stops "argument of type 'NoneType' is not iterable", and end tokens that are lost without a word."""
    (target / name).write_bytes(content)
    with pytest.raises(CoralError, match=rf"{name} (is no JSON|holds no object).*copy it again"):
        load(target)


@pytest.mark.parametrize("eos", ["end", -1, 3.5, True, [2, None], {"a": 1}])
def test_an_end_that_is_no_token_is_refused(target: Path, eos: Any) -> None:
    """Stops answers that go on to their limit because their end token could not be read."""
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(CoralError, match=r"eos_token_id holds .*, which is no token id"):
        load(target)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_target_whose_scores_are_not_finite_writes_nothing(target: Path, value: float) -> None:
    """Stops text out of damaged weights, or of float16 that overflows, as if it were the target's."""
    edit(target, lambda tensors: tensors["model.norm.weight"].fill_(value))
    pair = load(target)
    with pytest.raises(CoralError, match=r"scores of .*target are not finite"):
        pair.generate([1, 2, 3], max_new_tokens=2)
    from coral.decoding.batch import write_padded
    from coral.decoding.plain import Plain
    from coral.decoding.sampling import Sampling
    from coral.decoding.state import State
    from coral.serving.engine import Engine
    from coral.tree import DEFAULT

    with pytest.raises(CoralError, match="are not finite"):
        write_padded(pair.target, [[1, 2]], [Sampling()], [0], 2)
    states = iter([State.begin(pair.target, [1, 2], 2)])
    with pytest.raises(CoralError, match="are not finite"):
        list(Engine(pair.target, Plain(), DEFAULT).write(lambda: next(states, None)))


def test_weights_of_whole_numbers_are_no_weights(target: Path) -> None:
    """Stops a quantised model without its config, whose numbers would be taken for its weights."""
    edit(target, lambda tensors: tensors.update({UP: tensors[UP].to(torch.int8)}))
    with pytest.raises(CoralError, match=f"it holds as whole numbers {re.escape(UP)}"):
        load(target)
