"""A GGUF file's own blocks in native products and as a target, against slow twins and plain decoding."""

from __future__ import annotations

import shutil
from ctypes import CDLL, byref, c_int64, c_void_p
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from tiny import Bushes, prompt_of, random_tree, tiny_model, tree_of, write
from tiny_gguf import write_gguf
from torch import Tensor

from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.decoding.state import State
from coral.drafters import tuned
from coral.errors import CoralError
from coral.native import packing
from coral.target import native as forward
from coral.target.gguf import cache
from coral.target.target import Target
from coral.tree import TreeSize

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")

KINDS = [*packing.BLOCKS]
MODELS = ["llama", "llama-tied", "qwen2", "qwen3", "phi3", "olmo2"]
SIZES = {"hidden_size": 288, "head_dim": 32, "intermediate_size": 320, "vocab_size": 99}  # not whole panels


@pytest.fixture(scope="module")
def library() -> CDLL:
    built = forward._library()
    if built is None:
        pytest.skip("no C++ compiler for this processor")
    return built


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path_factory.mktemp("cache") / "gguf"
    monkeypatch.setattr(cache, "root", lambda: directory)


def product(
    library: CDLL, kind: str, blocks: np.ndarray, rows: Tensor, unit: int, threads: int = 1
) -> Tensor:
    number, panels = packing.pack_blocks(library, kind, [torch.from_numpy(blocks)])
    matrix = forward._Matrix(panels.data_ptr(), None, rows.shape[1], len(blocks), number)
    sums = torch.full((len(rows), len(blocks)), torch.nan)
    pointers = c_void_p(rows.data_ptr()), c_void_p(sums.data_ptr())
    library.coral_multiply(
        byref(matrix), pointers[0], c_int64(len(rows)), c_int64(unit), c_int64(threads), pointers[1]
    )
    return sums


def slow_product(kind: str, blocks: np.ndarray, rows: Tensor) -> Tensor:
    """The order of blocks.h. A multiply-add rounds once: float64 holds what it rounds."""
    stored = blocks.reshape(len(blocks), rows.shape[1] // 32, -1)
    scales = stored[..., :2].copy().view(np.float16).astype(np.float64)[..., 0]
    offsets = stored[..., 2:4].copy().view(np.float16).astype(np.float64)[..., 0]
    if kind == "Q8_0":
        numbers = stored[..., 2:].view(np.int8).astype(np.float64)
    else:
        halves = stored[..., 4 if kind == "Q4_1" else 2 :]
        numbers = np.concatenate([halves & 15, halves >> 4], -1).astype(np.float64)
        numbers -= 8 * (kind == "Q4_0")
    x = rows.double().numpy().reshape(len(rows), -1, 32)
    total = np.zeros((len(rows), len(blocks)))
    for b in range(x.shape[1]):
        ends = [np.zeros_like(total), np.zeros_like(total)]
        for k in range(32):
            ends[k % 2] = single(x[:, b, k, None] * numbers[None, :, b, k] + ends[k % 2])
        total = single(single(ends[0] + ends[1]) * scales[None, :, b] + total)
        if kind == "Q4_1":
            total = single(x[:, b].sum(-1)[:, None] * offsets[None, :, b] + total)
    return torch.from_numpy(total).float()


def single(numbers: np.ndarray) -> np.ndarray:
    return numbers.astype(np.float32).astype(np.float64)


def ways() -> list[int]:
    """The units whose sums are in the same order."""
    return [0, 2] if forward._unit() == 2 else [0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs, inputs, rows", [(16, 32, 1), (77, 288, 2), (48, 544, 17), (40, 512, 70)])
def test_products_are_the_slow_ones_bit_for_bit(library, kind, outputs, inputs, rows) -> None:
    """Stops a weight that lands elsewhere, is rounded or has another scale, sums in another order by tiles
    than by vectors, panels and tiles that are not full, and a row that depends on those beside it.
    """
    torch.manual_seed(rows)
    weights = np.random.default_rng(rows).standard_normal((outputs, inputs)).astype(np.float32)
    blocks = quantize(weights, GGMLQuantizationType[kind])
    x = torch.randn(rows, inputs).bfloat16().float()
    if kind == "Q4_1":  # in any order a block's inputs make this sum
        x = torch.randint(-127, 128, (rows, inputs)) / 64
    slow = slow_product(kind, blocks, x)
    exact = x.double() @ torch.from_numpy(dequantize(blocks, GGMLQuantizationType[kind])).double().T
    assert (slow - exact).norm() < 1e-6 * exact.norm()
    for unit in ways():
        for threads in (1, 3):
            assert torch.equal(product(library, kind, blocks, x, unit, threads), slow)
        alone = [product(library, kind, blocks, row[None].contiguous(), unit) for row in x]
        assert torch.equal(torch.cat(alone), slow)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs, inputs, rows", [(16, 32, 1), (77, 288, 5), (48, 544, 17), (40, 512, 30)])
def test_pairs_are_multiplied_whatever_rows_stand_beside(library, kind, outputs, inputs, rows) -> None:
    """Stops pairs of other inputs, an offset or a scale that is left out, and sums that depend on the number
    of rows.
    """
    if forward._unit() == 0:
        pytest.skip("no vectors that multiply two numbers at once")
    torch.manual_seed(rows)
    weights = np.random.default_rng(rows).standard_normal((outputs, inputs)).astype(np.float32)
    blocks = quantize(weights, GGMLQuantizationType[kind])
    x = torch.randn(rows, inputs).bfloat16().float()
    exact = x.double() @ torch.from_numpy(dequantize(blocks, GGMLQuantizationType[kind])).double().T
    paired = product(library, kind, blocks, x, 1)
    assert (paired - exact).norm() < 1e-6 * exact.norm()
    assert torch.equal(product(library, kind, blocks, x, 1, 3), paired)
    alone = [product(library, kind, blocks, row[None].contiguous(), 1) for row in x]
    assert torch.equal(torch.cat(alone), paired)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_and_vectors_agree_where_numbers_vanish(library, kind) -> None:
    """Stops sums of numbers that are too small to be normal, which the matrix unit takes for zero."""
    if forward._unit() < 2:
        pytest.skip("no matrix unit for bfloat16")
    weights = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    blocks = quantize(weights, GGMLQuantizationType[kind])
    x = (torch.randn(5, 64) * 2.0 ** torch.randint(-135, -118, (5, 64))).bfloat16().float()
    by_vectors, by_tiles = (product(library, kind, blocks, x, unit) for unit in (0, 2))
    assert torch.equal(by_vectors, by_tiles)


@pytest.mark.parametrize("interleaved", [False, True])
def test_joined_matrices_are_those_beside_each_other(library, interleaved) -> None:
    """Stops rows of one matrix among those of another."""
    kind = "Q4_1"
    draw = np.random.default_rng(0)
    drawn = [draw.standard_normal((32, 64)).astype(np.float32) for _ in "ab"]
    parts = [torch.from_numpy(quantize(each, GGMLQuantizationType[kind])) for each in drawn]
    whole = torch.stack([part.unflatten(0, (2, 16)) for part in parts], 1).flatten(0, 2)
    _, joined = packing.pack_blocks(library, kind, [whole if interleaved else torch.cat(parts)])
    assert torch.equal(packing.pack_blocks(library, kind, parts, interleaved)[1], joined)


def targets(tmp_path: Path, name: str, kind: str) -> tuple[Target, Path]:
    """A model of whole numbers times a power of two, which blocks and bfloat16 hold alike."""
    low, high, unit = {"Q8_0": (-127, 127, 2**-10), "Q4_1": (-8, 7, 2**-6), "Q4_0": (-8, 7, 2**-6)}[kind]
    model = tiny_model(name, **SIZES)
    torch.manual_seed(0)
    for weight in (parameter.data for parameter in model.parameters() if parameter.dim() == 2):
        numbers = torch.randint(low, high + 1, weight.shape)
        numbers[:, ::32], numbers[:, 1::32] = low, high  # so that a block's scale is the unit
        weight.copy_(numbers * unit)
    path = write_gguf(tmp_path / f"{name}-{kind}.gguf", model, quantised=kind)
    return Target.load(path, dtype="packed"), path


def verified(target: Target, tree) -> Tensor:
    state = State(prompt_of(14, 99), 60, target.new_cache(60))
    state.prefill(target, (-1,))
    (logits,), (features,) = target.verify([state.cache], [tree])
    return torch.cat([logits, features], 1).float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_same_weights_in_bfloat16(tmp_path, name, kind) -> None:
    """Stops matrices of another layer, rows of queries and keys in the file's order, and a lost bias."""
    packed, path = targets(tmp_path, name, kind)
    assert packed.precision == "packed" and packed.on("native")._native is packed._native
    wide, tree = Target.load(path).on("native"), random_tree(9, vocab_size=99)
    stored = quantize(wide.head_weight.float().numpy(), GGMLQuantizationType[kind])
    assert (dequantize(stored, GGMLQuantizationType[kind]) == wide.head_weight.float().numpy()).all()
    own, other = verified(packed, tree), verified(wide, tree)
    assert (own - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("name", MODELS)
def test_trees_and_batches_write_what_plain_steps_write(tmp_path, name) -> None:
    """Stops a prompt, a large tree or a batch that is computed with other weights than plain steps are."""
    target, _ = targets(tmp_path, name, "Q4_1")
    for sampling in (Sampling(), Sampling(1.0, seed=3)):
        prompts = [prompt_of(5 + 30 * i, 99, seed=i) for i in range(3)]
        plain = write(target, Plain(), prompts, 24, sampling).texts
        for tree_size in (TreeSize(4, 4, 9), TreeSize(4, 6, 70)):
            assert write(target, Bushes(plain, 99), prompts, 24, sampling, tree_size).texts == plain
        assert [write(target, Plain(), [p], 24, sampling).texts[0] for p in prompts[:1]] == plain[:1]


@pytest.mark.parametrize("rows", [2, 15, 70])
def test_a_row_does_not_depend_on_the_rows_beside_it(tmp_path, rows) -> None:
    """Stops rows by tiles that are not those that vectors make, one at a time."""
    target, _ = targets(tmp_path, "qwen2", "Q8_0")
    tokens = prompt_of(rows, 99, seed=2)
    state = State(prompt_of(9, 99), 90, target.new_cache(90))
    state.prefill(target, (-1,))
    (together,), _ = target.verify([state.cache], [tree_of(tokens, range(-1, rows - 1))])
    state.cache.keep(8)
    steps = [target.verify([state.cache], [tree_of([token], [-1])])[0][0] for token in tokens]
    assert torch.equal(together, torch.cat(steps))


def test_what_cannot_stay_packed_is_refused(tmp_path, monkeypatch) -> None:
    """Stops a target that runs in bfloat16 without a word where packed was asked for."""
    model = tiny_model("llama", **SIZES)
    other = write_gguf(tmp_path / "Q5_0.gguf", model, quantised="Q5_0")
    with pytest.raises(
        CoralError, match=r"Q5_0\.gguf holds matrices in Q5_0, which cannot stay packed; only Q8_0"
    ):
        Target.load(other, dtype="packed")
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(CoralError, match="is no GGUF file, so it has no blocks"):
        Target.load(tmp_path / "plain", dtype="packed")
    foreign = write_gguf(
        tmp_path / "olmo2.gguf", tiny_model("olmo2", **SIZES | {"head_dim": 72}), quantised="Q8_0"
    )
    with pytest.raises(CoralError, match="cannot run natively: its sizes are no multiples of 16"):
        Target.load(foreign, dtype="packed")
    path = write_gguf(tmp_path / "mixed.gguf", model, quantised="Q8_0")
    blocks = packed_blocks(path)
    name = "model.layers.0.mlp.gate_proj.weight"
    monkeypatch.setitem(blocks.places, name, packed_blocks(other, all_kinds=monkeypatch).places[name])
    with pytest.raises(CoralError, match=r"in Q5_0, Q8_0, but they are multiplied together"):
        blocks.packed([name, "model.layers.0.mlp.up_proj.weight"])


def packed_blocks(path: Path, all_kinds: pytest.MonkeyPatch | None = None):
    if all_kinds is not None:
        all_kinds.setitem(packing.BLOCKS, "Q5_0", (9, 22, 352))
    return cache.blocks(path)


def test_a_tree_is_tuned_for_packed_weights_alone(tmp_path) -> None:
    """Stops a tree that was tuned where rows cost something else."""
    packed, path = targets(tmp_path, "llama", "Q8_0")
    places = [tuned.Conditions.of(target, "full") for target in (packed, Target.load(path))]
    assert [place.dtype for place in places] == ["packed", "bfloat16"]
