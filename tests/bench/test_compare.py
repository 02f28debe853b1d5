"""Whether a drafter is better: each test names a way to a false verdict."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coral.bench.compare import FEWEST, Run, compare, interval, line
from coral.bench.formulas import tau
from coral.bench.log import Log, read
from coral.bench.records import Record
from coral.decoding.state import Cycle
from coral.errors import CoralError

SETTINGS = {"target": "t", "max_new_tokens": 8, "tree_size": {"top_k": 2}, "seed": 0}


def record(method: str, prompt: int, lengths: list[int], seconds: float = 1.0, **changed: object) -> Record:
    """A text whose cycles emitted so many tokens each; the last one is cut."""
    cycles = [
        Cycle([1] * n, 4, n - 1, 3, 1, i == len(lengths) - 1, 0.1, 0.1, 0.3) for i, n in enumerate(lengths)
    ]
    made = Record("float32", 0.0, False, "drafter", method, "s", str(prompt), 0, [1] * sum(lengths), seconds,
                  0.1, len(cycles), cycles, "equal")  # fmt: skip
    return replace(made, **changed)


def run(*records: Record, **changed: object) -> Run:
    return {"settings": {**SETTINGS, **changed}, "commit": "c"}, list(records)


def test_a_known_difference() -> None:
    """Stops a mean of means, cut cycles in tau, and a difference that is not tau(FIRST) - tau(SECOND)."""
    a = [record("a", i, [3, 3, 4 - i % 2, 9], seconds=1.0) for i in range(40)]
    b = [record("b", i, [2, 2, 9], seconds=1.5) for i in range(40)]
    for found in compare(["a"], ["b"], [run(*a, *b)]):
        pooled = [tau([c for r in records for c in r.cycles]) for records in (a, b)]
        assert found.tau.value == pytest.approx(pooled[0] - pooled[1])
        assert found.tau.low < found.tau.value < found.tau.high and found.verdict == "better"
        assert found.speed is not None and found.speed.value == pytest.approx(1.5)
        assert (found.tau.prompts, found.left_out) == (40, 0)
    assert [d.suite for d in compare(["a"], ["b"], [run(*a, *b)])] == ["s", "all"]
    assert compare(["b"], ["a"], [run(*a, *b)])[0].verdict == "worse"


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Stops an unpaired interval (too wide: prompts vary more than drafters), and one that is too narrow."""
    rng = np.random.default_rng(0)
    hits, widths = 0, []
    for _ in range(300):
        easy = rng.normal(3.0, 1.0, 60)  # how easy each prompt is, for both alike
        gain = rng.normal(0.1, 0.2, 60)
        cycles = np.full(60, 10.0)
        sums = np.stack([(easy + gain) * 10, cycles, easy * 10, cycles], 1)
        found = interval(sums, "difference", draws=400)
        hits += found.low <= 0.1 <= found.high
        widths.append(found.high - found.low)
    assert 0.90 <= hits / 300 <= 0.98
    assert np.mean(widths) < 0.15  # 4 * 0.2 / sqrt(60); unpaired would be 0.7


counts = st.lists(st.integers(1, 9), min_size=2, max_size=5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(counts, counts), min_size=1, max_size=8))
def test_exchanging_the_names_turns_the_sign(pairs: list[tuple[list[int], list[int]]]) -> None:
    """Stops a comparison in which the order of the names helps one of them."""
    records = [record(name, i, lengths) for i, pair in enumerate(pairs)
               for name, lengths in zip("ab", pair, strict=True)]  # fmt: skip
    ab, ba = (compare([x], [y], [run(*records)], draws=200)[-1] for x, y in ("ab", "ba"))
    mirrored = (-ba.tau.value, -ba.tau.high, -ba.tau.low)
    assert (ab.tau.value, ab.tau.low, ab.tau.high) == pytest.approx(mirrored, abs=1e-12)
    equal = compare(["a"], ["a"], [run(*records)], draws=200)[-1]
    assert (equal.tau.value, equal.tau.low, equal.tau.high) == (0, 0, 0)
    assert equal.verdict == ("no difference shown" if len(pairs) >= FEWEST else "too few to say")


@pytest.mark.parametrize("prompts", [1, FEWEST - 1, FEWEST])
def test_a_few_prompts_are_no_evidence(prompts: int) -> None:
    """Stops `better` of one prompt, whose interval has no width, and of five that agree by chance."""
    records = [record(name, i, [n, 9]) for i in range(prompts) for name, n in (("a", 3), ("b", 2))]
    (found, _) = compare(["a"], ["b"], [run(*records)])
    assert found.verdict == ("better" if prompts >= FEWEST else "too few to say")
    assert ("over 1 prompt:" in line(found, "a", "b")) is (prompts == 1)


def test_seeds_and_turns_are_pooled_by_prompt() -> None:
    """Stops seeds or turns that count as further prompts: they would make any interval too narrow."""
    a = [record("a", i, [3 + i % 3, 9]) for i in range(6)]
    b = [record("b", i, [2 + i % 2, 9]) for i in range(6)]
    once = compare(["a"], ["b"], [run(*a, *b)])[-1]
    copies = [replace(r, method=r.method + "2") for r in (*a, *b)] + [replace(r, turn=1) for r in (*a, *b)]
    copies += [replace(r, method=r.method + "2", turn=1) for r in (*a, *b)]
    pooled = compare(["a", "a2"], ["b", "b2"], [run(*a, *b, *copies)])[-1]
    assert pooled.tau == once.tau and pooled.speed == once.speed
    # a third seed of one side must not make that side look slower
    uneven = compare(["a", "a2"], ["b"], [run(*a, *b, *copies)])[-1]
    assert uneven.speed is not None and uneven.speed.value == pytest.approx(1.0)


def test_only_what_all_have_counts_and_only_times_of_one_run() -> None:
    """Stops a drafter that looks good on the prompts that only it has, and times of two machines."""
    a = [record("a", i, [3, 9]) for i in range(5)]
    b = [record("b", i, [2, 9]) for i in range(1, 7)]
    for found in compare(["a"], ["b"], [run(*a), run(*b)]):
        assert (found.tau.prompts, found.left_out, found.speed) == (4, 3, None)
        assert line(found, "a", "b").endswith(
            "a - b: +1.00 tau [1.00, 1.00] over 4 prompts: too few to say; 3 prompts left out, not all have "
            "them"
        )
    warm = [record(n, 1, [3, 9], temperature=1.0, coupled=True) for n in "ab"]
    assert {d.temperature for d in compare(["a"], ["b"], [run(*a, *b), run(*warm)])} == {0.0, 1.0}


def test_lookup_is_compared_with_coupled_drafting_too() -> None:
    """Stops a comparison at T = 1 that is left out in silence since lookup has no noise to share."""
    texts = [record("a", 1, [3, 9], temperature=1.0, coupled=coupled) for coupled in (True, False)]
    texts += [record(name, 1, [2, 9], temperature=1.0, kind="peer") for name in ("ngram", "plain")]
    found = compare(["a"], ["ngram"], [run(*texts)])
    assert [d.coupled for d in found if d.suite == "all"] == [True, False]
    assert all(d.tau.value == 1 for d in found)
    assert [d.coupled for d in compare(["ngram"], ["plain"], [run(*texts)])] == [False, False]


def test_refusals() -> None:
    """Stops a misspelt name that compares nothing, and taus of two trees that pass as two drafters."""
    a, b = record("a", 0, [3, 9]), record("b", 1, [2, 9])
    with pytest.raises(CoralError, match=r"'c'; known are a, b\."):
        compare(["a"], ["c"], [run(a, b)])
    with pytest.raises(CoralError, match="in common"):
        compare(["a"], ["b"], [run(a, b)])
    with pytest.raises(CoralError, match="differ in tree_size"):
        compare(["a"], ["b"], [run(a), run(b, tree_size={"top_k": 3})])


def test_a_bench_that_runs_or_was_killed_can_be_read(tmp_path: Path) -> None:
    """Stops a torn last line from hiding all that is finished."""
    header = {"settings": SETTINGS, "commit": "c"}
    log, one = Log(tmp_path / "records.jsonl", header), record("a", 0, [3, 9])
    log.add(one)
    with log.path.open("a") as file:
        file.write('{"record": {"dtype"')
    assert read(tmp_path) == ({**header, "trees": {}}, [one])
    log.path.write_text("[]\n")
    with pytest.raises(CoralError, match=r"records\.jsonl"):
        read(tmp_path)
