"""Numbers that native code believes are checked in Python first: ids, trees, sizes of drafters and models."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_pair import NATIVE, save_target
from transformers import AutoModelForCausalLM

from coral.api import LLM, load
from coral.decoding.plain import Plain
from coral.drafters import checkpoint
from coral.drafters.feature.network import Drafter, DrafterConfig
from coral.errors import CoralError
from coral.target.native import why_not_native
from coral.target.record import TargetRecord
from coral.target.target import Target
from coral.tree import DEFAULT, TreeSize

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


def written(pair: LLM, ids: list[int]) -> list[int]:
    return [i for cycle in pair.stream(ids, max_new_tokens=4) for i in cycle.tokens]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("place")
    save_target(directory / "target", **NATIVE)
    return directory / "target"


@needs_compiler
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("odd", [-5, -1, 270, 999_999, 2**63 - 1])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_ids_outside_the_vocabulary_are_named(place: Path, native: bool, odd: int, at: int) -> None:
    """Stops a segmentation fault, and text that foreign memory wrote; the last id, the root, is one."""
    pair = load(place, backend="native" if native else "transformers")
    assert (pair.target._native is not None) is native
    ids = [5, 6, 7]
    assert written(pair, ids)
    ids[at] = odd
    with pytest.raises(CoralError, match=rf"token id {odd}, but those of .* are 0 to 269"):
        written(pair, ids)
    state = pair.start([5, 6, 7], max_new_tokens=3)
    list(pair.cycles(state))
    state.continue_with([5, 6, odd, 7], 8)  # a longer conversation is checked, too
    with pytest.raises(CoralError, match=f"token id {odd}"):
        list(pair.cycles(state))


@needs_compiler
def test_a_tokenizer_that_is_larger_than_the_embedding(place: Path, tmp_path: Path) -> None:
    """Stops the same from plain text."""
    save_target(tmp_path / "small", vocab_size=100, **NATIVE)
    pair = load(tmp_path / "small")
    with pytest.raises(CoralError, match=r"are 0 to 99; its tokenizer has 270 tokens: use the tokenizer"):
        pair.generate("h\u00e9\u00fe", chat=False, max_new_tokens=4)


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.resize_token_embeddings(300, mean_resizing=False),
        lambda model: model.resize_token_embeddings(20, mean_resizing=False),
        lambda model: model.bfloat16(),
        lambda model: model.set_output_embeddings(torch.nn.Linear(32, 270, bias=False)),
    ],
)
@pytest.mark.parametrize("native", [True, False])
def test_a_model_that_was_changed_since(place: Path, native: bool, change: Any) -> None:
    """Stops native code that reads where the old embedding was."""
    model = AutoModelForCausalLM.from_pretrained(place, attn_implementation="sdpa")
    pair = load(model, backend="native" if native else "transformers")
    assert written(pair, [5, 6, 7])
    change(model)
    with pytest.raises(CoralError, match="was resized, converted or moved after it was loaded here"):
        written(pair, [5, 6, 7])
    if model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape:
        assert written(load(model, backend="native" if native else "transformers"), [5, 6, 7])


def test_an_embedding_and_a_head_of_two_sizes(place: Path) -> None:
    """Stops an id that the head writes and the embedding has no row for."""
    model = AutoModelForCausalLM.from_pretrained(place, attn_implementation="sdpa")
    model.set_input_embeddings(torch.nn.Embedding(200, 32))
    with pytest.raises(CoralError, match=r"embedding has shape \(200, 32\), but its LM head \(270, 32\)"):
        Target(model)


@pytest.mark.parametrize("kind", ["q_proj", "k_proj", "o_proj", "down_proj", "up_proj"])
def test_layers_whose_sizes_do_not_go_together_are_not_run_natively(place: Path, kind: str) -> None:
    """Stops products that read past the end of a weight, in a model that was pruned by hand."""
    target = Target.load(place)
    assert why_not_native(target) is None or not shutil.which("g++")
    layer = target.decoder.layers[1]
    module = layer.mlp if kind in ("down_proj", "up_proj") else layer.self_attn
    old = getattr(module, kind)
    setattr(module, kind, torch.nn.Linear(old.in_features, old.out_features + 16, bias=False))
    target.model.requires_grad_(False)
    assert why_not_native(target) == "the sizes of its layers do not go together"


@pytest.mark.parametrize(
    "numbers",
    [
        (0, 1, 1),
        (-1, 1, 1),
        (257, 1, 1),
        (1, -1, 1),
        (1, 257, 1),
        (1, 1, 0),
        (1, 1, 4097),
        (1, 1, 2**70),
        (1, 1, 1, -0.1),
        (1, 1, 1, math.nan),
        (1, 1, 1, 1.1),
        (1.0, 1, 1),
        ("1", 1, 1),
        (True, 1, 1),
        (1, None, 1),
    ],
)
def test_trees_have_bounds(numbers: tuple[Any, ...]) -> None:
    """Stops a division by zero, a hang and an allocation of terabytes, wherever the tree comes from."""
    with pytest.raises(CoralError, match="the draft tree's"):
        TreeSize(*numbers)
    assert TreeSize(256, 256, 4096, 1).within(3).max_depth == 2


@pytest.mark.parametrize("size", ["hidden_size", "vocab_size", "num_key_value_heads", "head_dim"])
def test_a_drafter_whose_sizes_are_not_the_targets(place: Path, tmp_path: Path, size: str) -> None:
    """Stops a drafter that reads features of another width, although its record names the right target."""
    target = Target.load(place)
    config = DrafterConfig.for_target(target.config)
    checkpoint.save(Drafter(config), tmp_path / "d", target=TargetRecord.of(target))
    path = tmp_path / "d" / "coral" / "config.json"
    record = json.loads(path.read_text())
    record["drafter"][size] += 16 if size == "hidden_size" else 3
    path.write_text(json.dumps(record))
    if size in ("hidden_size", "vocab_size"):
        tensors = Drafter(DrafterConfig(**record["drafter"])).state_dict()
        save_file(
            {name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "d/model.safetensors"
        )
        wanted = f"the drafter's {size} is"
    else:
        wanted = "make no drafter"
    with pytest.raises(CoralError, match=wanted):
        load(place, tmp_path / "d")


def test_a_loaded_drafter_of_other_sizes(place: Path) -> None:
    """Stops the same for one that was made in this process."""
    target = Target.load(place)
    drafter = Drafter(DrafterConfig.for_target(target.config, hidden_size=64))
    with pytest.raises(CoralError, match=r"the drafter's hidden_size is 64, but .* has 32"):
        load(target, drafter)
    assert LLM(target, Plain(), DEFAULT)
