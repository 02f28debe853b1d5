"""What rows cost decides how large the trees of a batch are; what is learnt of trees decides with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import new_state, prompt_of, random_drafter, tiny_model, tiny_target

from coral.decoding import row_costs
from coral.decoding.fallback import Fallback
from coral.decoding.promises import Promises
from coral.decoding.row_costs import ASSUMED, PLAIN, Promise, RowCosts, at
from coral.drafters.default_tree import fastest
from coral.target.target import Target
from coral.tree import CPU_DEFAULT, DraftTree, TreeSize

FREE = RowCosts({1: 1.0, 64: 1.0}, {1: 0.01, 16: 0.01})
DEAR = RowCosts({1: 1.0, 2: 2.0}, {1: 0.1, 16: 1.6})


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Costs are measured, as outside tests, and kept in a directory of this test."""
    monkeypatch.setattr(row_costs, "SECONDS", 0.2)
    monkeypatch.setattr(row_costs, "root", lambda: tmp_path)
    return tmp_path


def long_target() -> Target:
    return Target(tiny_model(max_position_embeddings=400), name="long")


def test_costs_are_linear_between_sizes_and_beyond_the_largest() -> None:
    """Stops a size that was not measured from costing what another does."""
    table = {1: 1.0, 2: 1.5, 4: 3.5}
    assert [at(table, rows) for rows in (0.5, 1, 1.5, 3, 4, 8)] == [1.0, 1.0, 1.25, 2.5, 3.5, 7.5]


def test_a_cycle_costs_its_rows_and_the_levels_that_are_drafted() -> None:
    """Stops a level that is counted though no text drafts it, and rows of one text for those of all."""
    assert ASSUMED.seconds(4, PLAIN) == ASSUMED.forward[4]
    one = ASSUMED.seconds(1, Promise(1.5, (1.0,)))
    assert one == pytest.approx(at(ASSUMED.forward, 2) + at(ASSUMED.step, 1.3))
    deep, shallow = (ASSUMED.seconds(2, Promise(1.5, widths)) for widths in ((1.0, 0.5), (1.5,)))
    assert deep > shallow > ASSUMED.seconds(2, PLAIN)
    assert ASSUMED.speed(2, PLAIN) == pytest.approx(2 / 1.02)
    assert ASSUMED.seconds(2, Promise(1.5, (1.0, 1e-18, 5e-324, 0.0))) == pytest.approx(
        ASSUMED.seconds(2, Promise(1.5, (1.0, 0.0)))
    )  # a mean that fades never becomes nothing


def test_costs_are_measured_once_and_kept(measuring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops a second of measuring before every text, costs of another machine or drafter, and a damaged file
    that ends the program.
    """
    monkeypatch.setattr(row_costs, "_ALIKE", 1e9)  # tests share the machine
    target = long_target()
    proposer = random_drafter(target)
    costs = row_costs.of(target, proposer)
    assert set(costs.forward) == set(row_costs.ROWS) and set(costs.step) == set(row_costs.TOP_KS)
    assert row_costs.of(target, proposer) == costs and len(row_costs.entries()) == 2
    monkeypatch.setattr(row_costs, "device_name", lambda device: "another")
    assert row_costs.of(target, proposer) != costs and len(row_costs.entries()) == 4
    for path in measuring.iterdir():
        path.write_text("{}")
    assert not row_costs.entries()
    row_costs.of(target, proposer)
    assert len(row_costs.entries()) == 2
    row_costs.note(target, proposer, FREE)
    assert row_costs.of(target, proposer) == FREE
    row_costs.clear()
    assert not measuring.exists()


def test_a_busy_machine_tells_nothing(measuring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops costs that were measured beside neighbours from being kept for good."""
    monkeypatch.setattr(row_costs, "_ALIKE", 0.5)
    assert row_costs.of(long_target()) is ASSUMED and not row_costs.entries()
    assert row_costs.of(tiny_target()) is ASSUMED  # whose context has no room for so many rows


def chain(*scores: float) -> DraftTree:
    return DraftTree([*range(len(scores) + 1)], [*range(-1, len(scores))], [0.0, *scores])


def test_what_trees_promise_is_learnt_for_each_least_probability() -> None:
    """Stops a mean that takes nodes in that a higher `min_gain` leaves out, or learns what it cannot know."""
    promises = Promises()
    before = promises.of(0.1)
    for _ in range(600):
        promises.note(chain(-0.2, -0.5, -1.5), 2, min_gain=0.2)  # 0.82, 0.61, 0.22
    assert promises.of(0.1).widths == before.widths
    assert promises.of(0.2).widths[:4] == pytest.approx([1, 1, 1, 0], abs=1e-3)
    assert promises.of(0.5).widths[:3] == pytest.approx([1, 1, 0], abs=1e-3)
    assert promises.of(0.9).widths[0] == pytest.approx(0, abs=1e-3)
    assert promises.kept == 1.0  # of 1.65 tokens promised 2 came
    assert promises.of(0.5).tokens == pytest.approx(1 + 0.819 + 0.607, abs=0.01)
    for _ in range(600):
        promises.note(chain(-0.2, -0.5), 0, min_gain=0.5)
    assert promises.of(0.5).tokens == pytest.approx(1, abs=0.01)


def test_trees_shrink_with_the_batch_and_with_what_rows_cost() -> None:
    """Stops a batch whose verification costs more than its drafts bring, and cheap rows that are not used."""
    promises = Promises()
    gains = [promises.best(ASSUMED, live, CPU_DEFAULT) for live in (1, 2, 4, 16, 64)]
    assert [pays for _, pays in gains] == [True, True, False, False, False]
    least = [size.min_gain for size, _ in gains]
    assert least == sorted(least) and least[0] == CPU_DEFAULT.min_gain
    for live in (1, 64):
        assert promises.best(FREE, live, CPU_DEFAULT) == (CPU_DEFAULT, True)
        assert not promises.best(DEAR, live, CPU_DEFAULT)[1]
    strict = TreeSize(2, 4, 7, 0.95)
    assert promises.best(ASSUMED, 1, strict)[0] == strict


def test_the_built_in_tree_follows_what_rows_cost() -> None:
    """Stops a tree of 7 nodes where 23 cost no more, and one where a single row costs a plain step."""
    assert fastest(ASSUMED) == CPU_DEFAULT
    matrix_unit = RowCosts({1: 1.0, 16: 1.06, 32: 1.18, 64: 1.44}, {1: 0.04, 4: 0.08, 16: 0.1})
    assert fastest(matrix_unit).num_nodes > 20
    assert fastest(DEAR) == TreeSize(1, 1, 1)


@pytest.mark.parametrize(("costs", "drafts"), [(FREE, True), (DEAR, False)])
def test_a_batch_rests_at_once_where_drafting_cannot_pay(costs: RowCosts, drafts: bool) -> None:
    """Stops cycles of a large batch that are spent to learn what costs already tell."""
    target = tiny_target()
    fallback = Fallback(random_drafter(target), lambda: costs)
    states = [new_state(target, prompt_of(5, seed=i)) for i in range(3)]
    for state in states:
        state.prefill(target, (-1,))
    trees = fallback.propose(states[:2], CPU_DEFAULT)
    assert [tree.num_forwards > 0 for tree in trees] == [drafts, drafts]
    assert fallback.propose(states[2:], CPU_DEFAULT)[0].num_forwards > 0
