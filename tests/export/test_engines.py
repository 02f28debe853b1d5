"""The comparison with vLLM: a check that lets a wrong drafter pass is worse than none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import chains
import pytest
import torch
import vllm_check
from agreement import Counts, judge
from tiny_pair import save_drafter, save_target

from coral.bench.equality import Verdict
from coral.bench.methods import ours
from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.drafters import checkpoint
from coral.drafters.feature.propose import Feature
from coral.target.target import Target
from coral.tree import TreeSize

COUNTS = Counts(1000, [800, 500, 200, 100])
EQUAL: list[Verdict] = ["equal"] * 24


def test_what_agrees_passes() -> None:
    """Stops a check that nothing can pass; one near tie in 24 is allowed."""
    assert judge(EQUAL, COUNTS, COUNTS)[1] == []
    found, failed = judge([*EQUAL[:23], "near_tie"], COUNTS, Counts(1000, [805, 505, 195, 98]))
    assert failed == [] and "23 of 24 texts equal (1 near ties, 0 wrong)" in found


@pytest.mark.parametrize(
    ("verdicts", "theirs", "why"),
    [
        ([*EQUAL[:23], "wrong"], COUNTS, "texts"),
        ([*EQUAL[:22], "near_tie", "near_tie"], COUNTS, "texts"),
        ([], COUNTS, "texts"),
        (EQUAL, replace(COUNTS, accepted_by_position=[787, 487, 187, 87]), "tau"),  # by 2%
        (EQUAL, replace(COUNTS, accepted_by_position=[813, 513, 213, 113]), "tau"),
        (EQUAL, replace(COUNTS, accepted_by_position=[825, 475, 200, 100]), "acceptance by position"),
        (EQUAL, Counts(0, [0, 0, 0, 0]), "tau"),  # nothing was drafted
    ],
)
def test_what_differs_fails(verdicts: list[Verdict], theirs: Counts, why: str) -> None:
    """A planted wrong text, a tau off by 2%, a shifted position, an engine that drafted nothing."""
    assert why in judge(verdicts, COUNTS, theirs)[1]


def test_counts() -> None:
    """Stops a bonus token that is counted twice or never, and positions off by one."""
    counts = Counts.of([0, 1, 4, 4], 4)
    assert counts.accepted_by_position == [3, 2, 2, 2] and counts.tau == 1 + 9 / 4
    assert counts.by_position == [0.75, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("accepted", "written", "expected"),
    [
        ([4, 4], 11, [(4, 4), (4, 4)]),  # 1 + 5 + 5
        ([4, 4], 10, [(4, 4), (3, 3)]),  # the last of all is the target's own
        ([4, 3, 0], 10, [(4, 4), (3, 3)]),
        ([2, 4, 3], 9, [(4, 2), (4, 4)]),
        ([4, 2, 1], 10, [(4, 4), (3, 2)]),  # and one without a draft
    ],
)
def test_llama_cpp_drafts_no_further_than_a_text_goes(accepted, written, expected) -> None:
    """Stops counts that differ in the last cycle of each text, and are therefore not compared at all."""
    assert chains.shortened(accepted, written, written, 4) == expected


@pytest.mark.parametrize(("ends_at", "counted"), [(1, 0), (2, 1), (3, 2), (4, 4)])
def test_llama_cpp_looks_no_further_than_the_end_token(ends_at, counted) -> None:
    """Stops the same where a drafted token ends the text: nothing is checked behind it."""
    assert chains.shortened([4], 1 + ends_at, 64, 4) == [(4, counted)]


def test_our_chains_are_cut_nowhere(tmp_path: Path) -> None:
    """Stops cycles whose chain is shorter since the text ends: vLLM drafts whole chains up to the end."""
    save_target(tmp_path / "target")
    save_drafter(tmp_path / "drafter", tmp_path / "target")
    target = Target.load(tmp_path / "target", dtype="float32")
    proposer = Feature(checkpoint.load(tmp_path / "drafter", target, dtype=torch.float32), target)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5]]
    texts, counts = vllm_check.chains(target, proposer, prompts, 11, 3)
    plain = ours(target, Plain(), TreeSize(1, 0, 1))
    assert texts == [plain(prompt, Sampling(), 0, 11).tokens for prompt in prompts]
    # Each text is its first token and its cycles; only what lies behind the end may be more.
    accepted = sum(counts.accepted_by_position)
    assert 2 * 10 <= accepted + counts.cycles <= 2 * (10 + 3)
