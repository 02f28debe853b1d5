"""Heads: a routed one scores what it looks at as the dense one does, and looks where the target's mass is."""

import io
import json
import re
import runpy
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny import V, tiny_target
from tiny_training import tiny_data, tiny_drafter
from tiny_training import tiny_target as training_target

from coral.data.features import frequencies
from coral.drafters.heads import store as heads
from coral.drafters.heads.full import FullHead
from coral.drafters.heads.groups import GROUPINGS, outside, split
from coral.drafters.heads.in_context import InContextHead
from coral.drafters.heads.routed import RoutedHead, Router, group_logits
from coral.drafters.heads.vocabulary import most_frequent
from coral.errors import CoralError
from coral.training.head_loop import HeadConfig
from coral.training.router import group_recall, train_router

CORE = torch.tensor([30, 2, 17])


def routed(active: int, groups: int = 4, grouping: str = "kmeans", core=None) -> RoutedHead:
    target = tiny_target()
    torch.manual_seed(3)
    router = Router(target.hidden_size, groups + (core is not None))
    torch.nn.init.normal_(router.w1.weight)
    ids = split(grouping, groups, target.head_weight, torch.arange(V), core=core)
    return RoutedHead(target, router, ids, active)


@settings(deadline=None)
@given(st.integers(4, 70), st.integers(2, 8), st.sampled_from(GROUPINGS), st.integers(0, 9))
def test_groups_and_core_hold_each_id_once(vocab_size, groups, grouping, size):
    """Stops an id that no group holds, one of the core in a group too, and groups of different cost."""
    core = torch.randperm(vocab_size)[:size]
    rest = vocab_size - len(core)
    given = (grouping, groups, torch.randn(vocab_size, 3), torch.ones(vocab_size), 0, core)
    if groups > rest // 2:
        with pytest.raises(CoralError, match="too many"):
            split(*given)
        return
    ids = split(*given)
    assert ids.shape == (groups, -(-rest // groups))
    assert sorted(ids[ids >= 0].tolist() + core.tolist()) == list(range(vocab_size))
    assert outside(ids, vocab_size).tolist() == sorted(core.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_logits_are_of_the_groups_that_were_named(dtype, biased):
    """Stops the product of another group, or of one group with another's bias."""
    weight = torch.randn(5, 33, 17, dtype=dtype)
    bias = torch.randn(5, 33, dtype=dtype) if biased else None
    chosen = torch.tensor([3, 0, 4])
    for rows in (1, 4, 65):
        x = torch.randn(rows, 17, dtype=dtype)
        expected = torch.einsum("nh,arh->nar", x.float(), weight[chosen].float())
        expected = (expected if bias is None else expected + bias[chosen]).flatten(1)
        close = 1e-5 if dtype == torch.float32 else 0.1
        assert torch.allclose(group_logits(weight, bias, x, chosen).float(), expected, atol=close)


def test_the_core_is_of_the_ids_that_are_written_most():
    """Stops a core or a static head without the special ids, and a core where none is asked for."""
    counts = torch.tensor([5, 0, 9, 1, 7, 0])
    assert most_frequent(counts, [5], 3).tolist() == [5, 2, 4]
    assert most_frequent(counts, [5, 1, 3], 2).tolist() == [1, 3, 5]
    assert most_frequent(counts, [5], 0).tolist() == []
    assert most_frequent(counts, [], 99).tolist() == [2, 4, 0, 3, 1, 5]


def test_groupings_group_what_they_say():
    """Stops k-means that leaves similar rows apart, and bands that are not of frequency."""
    centre = torch.eye(4).repeat_interleave(8, 0)
    shuffled = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    rows = (centre + 0.05 * torch.randn(32, 4))[shuffled]
    ids = min(
        (split("kmeans", 4, rows, torch.ones(32), seed) for seed in range(5)), key=lambda g: _spread(rows, g)
    )
    assert _spread(rows, ids) < 0.2
    counts = torch.tensor([1, 9, 5, 7])
    assert split("frequency", 2, rows[:4], counts).tolist() == [[1, 3], [2, 0]]
    with pytest.raises(CoralError, match="not known; use kmeans"):
        split("by hand", 2, rows, counts)


def _spread(rows, ids):
    return max(float(rows[group].std(0).max()) for group in ids)


@pytest.mark.parametrize("core", [None, CORE])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_with_all_groups_topk_is_that_of_the_dense_scores(grouping, core):
    """Stops scores on another scale than the full head's, ids of the wrong group, and id -1."""
    features, zeros = torch.randn(5, 16), torch.zeros(5)
    full = FullHead(tiny_target())
    ids, values = full.topk(features, 6, [], zeros)
    found, scores = routed(4, grouping=grouping, core=core).topk(features, 6, [], zeros)
    assert torch.equal(found, ids) and torch.allclose(scores, values, atol=1e-5)


@pytest.mark.parametrize("core", [None, CORE])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_active_groups_share_the_mass_that_the_router_gives_them(grouping, core):
    """Stops scores that are renormalised over the active groups (every node would look sure), and a core
    whose ids are scored without its mass.
    """
    head, features = routed(2, grouping=grouping, core=core), torch.randn(5, 16)
    ids, scores = head.topk(features, 40, [], torch.zeros(5))
    mass, chosen = head.choose(features, torch.zeros(5))
    inside = torch.cat([head.ids[chosen].flatten(), *([] if core is None else [core])])
    inside = inside[inside >= 0]
    mass = torch.cat([mass[:, chosen], mass[:, 4:]], 1)
    real = scores > float("-inf")
    assert real.sum(-1).tolist() == [len(inside)] * 5
    assert {i for row in range(5) for i in ids[row][real[row]].tolist()} == set(inside.tolist())
    torch.testing.assert_close(scores.exp().sum(-1), mass.exp().sum(-1))
    exact = FullHead(tiny_target()).log_probs(features).gather(1, ids)
    torch.testing.assert_close(
        (scores - scores[:, :1])[real], (exact - exact[:, :1])[real], atol=1e-4, rtol=1e-4
    )


def test_likely_nodes_choose_the_groups():
    """Stops groups that are chosen for nodes that will hardly be reached."""
    head = routed(1)
    features = torch.randn(40, 16)
    first = head.router(features).argmax(-1)
    one, other = 0, int((first != first[0]).nonzero()[0])
    pair = features[[one, other]]
    for scores, group in (([-0.1, -20.0], first[one]), ([-20.0, -0.1], first[other])):
        ids, _ = head.topk(pair, 3, [], torch.tensor(scores))
        assert set(ids.flatten().tolist()) <= set(head.ids[group].tolist())


def save(directory, router, ids, **numbers):
    tensors = {f"router.{name}": tensor for name, tensor in router.state_dict().items()}
    heads.save(directory, "routed", {**tensors, "ids": ids.int()}, active=2, **numbers)


def test_a_head_comes_back_from_its_directory(tmp_path, saved_drafter):
    """Stops a head that is loaded for another vocabulary, or silently replaced by the full one."""
    directory, target = saved_drafter
    assert isinstance(heads.load(directory, target), InContextHead)
    with pytest.raises(CoralError, match="no routed head; make one with `coral train-head"):
        heads.load(directory, target, "routed")
    ids = split("contiguous", 4, target.head_weight, torch.ones(V))
    router = Router(target.hidden_size, 4)
    save(directory, router, ids)
    loaded = heads.load(directory, target)
    assert isinstance(loaded, RoutedHead) and loaded.active == 2 and torch.equal(loaded.ids, ids)
    assert torch.equal(loaded.router.w2.weight, router.w2.weight)
    assert heads.load(directory, target, active=3).active == 3
    assert isinstance(heads.load(directory, target, "full"), FullHead)
    assert isinstance(heads.load(directory, target, "in_context"), InContextHead)
    save(directory, router, ids.clamp(max=20))
    with pytest.raises(CoralError, match="each of the target's 31 ids once"):
        heads.load(directory, target)
    (directory / "coral" / "heads" / "routed.safetensors").write_bytes(b"cut off")
    with pytest.raises(CoralError, match="cannot be read"):
        heads.load(directory, target)
    with pytest.raises(CoralError, match="not known; use auto, full, in_context, routed, static, low_rank"):
        heads.load(directory, target, "cheap")


def test_a_core_comes_back_from_its_directory(saved_drafter):
    """Stops ids of a larger vocabulary that are taken for a core, and a router that has no output for it."""
    directory, target = saved_drafter
    ids = split("contiguous", 4, target.head_weight, torch.ones(V), core=CORE)
    router = Router(target.hidden_size, 5)
    save(directory, router, ids, core=3)
    head = heads.load(directory, target)
    assert isinstance(head, RoutedHead) and head.core.tolist() == [2, 17, 30]
    assert torch.equal(head.router.w2.weight, router.w2.weight)
    save(directory, router, ids, core=2)  # written for a vocabulary of one id less
    with pytest.raises(CoralError, match="each of the target's 31 ids once"):
        heads.load(directory, target)
    save(directory, Router(target.hidden_size, 4), ids, core=3)
    with pytest.raises(CoralError, match="cannot be read"):
        heads.load(directory, target)


@pytest.fixture
def saved_drafter(tmp_path):
    from tiny import random_drafter

    from coral.drafters import checkpoint
    from coral.target.record import TargetRecord

    target = tiny_target()
    checkpoint.save(random_drafter(target).drafter, tmp_path / "d", target=TargetRecord.of(target))
    return tmp_path / "d", target


@pytest.mark.slow
def test_a_trained_router_finds_the_targets_mass():
    """Stops a router that learns from the wrong rows: its recall would stay at that of chance."""
    target, data = training_target(), tiny_data(rows=24)
    ids = split("kmeans", 4, target.head_weight, torch.ones(31))
    drafter = tiny_drafter().eval().requires_grad_(False)
    config = HeadConfig(updates=1, batch_size=4, steps=2)
    _, before = train_router(target, drafter, data.dataset, ids, 1, config)
    config = HeadConfig(updates=120, batch_size=4, steps=2, learning_rate=1e-2)
    _, after = train_router(target, drafter, data.dataset, ids, 1, config)
    assert len(after) == 2 and after[0] > before[0] + 0.1
    beside = split("kmeans", 4, target.head_weight, torch.ones(31), core=torch.arange(8))
    router, more = train_router(target, drafter, data.dataset, beside, 1, config)
    assert router.w2.out_features == 5 and more[0] > before[0] + 0.1
    _, all_of_it = train_router(target, drafter, data.dataset, beside, 4, replace(config, updates=1))
    assert all_of_it == pytest.approx([1.0, 1.0], abs=1e-5)
    counts = frequencies(data.dataset, 31)
    assert int(counts.sum()) == sum(int(torch.as_tensor(row["loss_mask"]).sum()) for row in data.dataset)


class StopsAt:
    """Rows of data that send a signal when row `number` (counted by reading) is read."""

    def __init__(self, dataset, number, signal_number):
        self.dataset, self.left, self.signal_number = dataset, number, signal_number

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(self.signal_number)
        return self.dataset[index]


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_router_starts_again(signal_number):
    """Stops a signal that is swallowed, one that stays ours afterwards, and draws that a stop moves on."""
    target, data = training_target(), tiny_data(rows=24)
    drafter = tiny_drafter().eval().requires_grad_(False)
    ids = split("kmeans", 4, target.head_weight, torch.ones(31))
    config = HeadConfig(updates=40, batch_size=4, steps=2, learning_rate=1e-2, log_every=10)
    console = Console(file=io.StringIO(), width=200)
    whole, recall = train_router(target, drafter, data.dataset, ids, 1, config, console)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 4 and re.fullmatch(
        r"100%  update 40  loss \d+\.\d{4}  recall \d+\.\d% \d+\.\d%", lines[-1]
    )
    stopping = StopsAt(data.dataset, 15 * 4, signal_number)
    before = signal.getsignal(signal_number)
    with pytest.raises(KeyboardInterrupt):
        train_router(target, drafter, stopping, ids, 1, config, console)
    assert signal.getsignal(signal_number) is before
    again, found = train_router(target, drafter, data.dataset, ids, 1, config, console)
    assert found == recall
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_group_recall_is_the_mass_inside_the_chosen_groups():
    """Stops a recall of the groups with most mass instead of those that the router names."""
    log_mass = torch.tensor([[[0.5, 0.3, 0.2]], [[0.1, 0.2, 0.7]]]).log()
    mass = torch.tensor([[0.1, 0.6, 0.3]])
    assert group_recall(log_mass, mass, 1).flatten().tolist() == pytest.approx([0.1, 0.3])
    assert group_recall(log_mass, mass, 9).flatten().tolist() == pytest.approx([1.0, 1.0])


def test_the_benchmark_of_heads_runs(tmp_path, monkeypatch, capsys):
    """Stops a published table whose command no longer works, and bytes that are not those that are read."""
    script = Path(__file__).parents[2] / "benchmarks" / "heads.py"
    monkeypatch.setattr("sys.argv", [str(script), str(tmp_path), "--size", "640,8", "--seconds", "0.1"])
    runpy.run_path(str(script), run_name="__main__")
    assert (tmp_path / "results.md").read_text() in capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    read = {r["head"]: r["bytes"] for r in rows if r["dtype"] == "float32"}
    assert read["8 of 32 groups"] == 4 * 8 * (640 // 4 + 8 + 32)
    assert read["2 of 16 groups beside 160 ids"] == 4 * 8 * (160 + 2 * 480 // 16 + 8 + 17)
    assert read["in context, 640 ids"] == read["full"] == 4 * 640 * 8
    assert read["low rank 2, 32 rescored"] == 4 * 2 * (640 + 8)
    assert {r["bytes"] for r in rows if r["head"] == "full"} == {4 * 640 * 8, 2 * 640 * 8}
