"""A cycle waits for the device once: for what the target wrote."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import prompt_of, random_drafter, tiny_target, write

from coral import tree
from coral.decoding import sampling
from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.drafters.feature.propose import Feature
from coral.drafters.recurrent import growth
from coral.tree import TreeSize


@pytest.mark.slow
def test_a_cycle_waits_for_nothing_else():
    """Stops a look at a number on the GPU, or a copy from ordinary memory, in propose, verify, sample or
    keep: each empties the queue, and the GPU idles until the host has filled it again.
    """
    run = [sys.executable, Path(__file__).with_name("fake_gpu.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    # The last one does wait: what is looked for is found.
    assert [line.split(":")[0] for line in found.stdout.splitlines()] == ["Curious"], found.stdout


@pytest.mark.slow
@pytest.mark.parametrize("sampled", [Sampling(), Sampling(1.0, seed=3), Sampling(0.7, top_k=9, top_p=0.8)])
def test_without_waits_the_same_is_written(sampled, monkeypatch):
    """Stops another path, text or count of levels where numbers may not be looked at."""
    target, tree_size = tiny_target(), TreeSize(top_k=3, max_depth=4, num_nodes=7)
    proposer = Feature(random_drafter(target).drafter, target)
    proposer._native = None
    prompts = [prompt_of(length) for length in (5, 9, 14)]
    plain = write(target, Plain(), prompts, 24, sampled)
    looks = write(target, proposer, prompts, 24, sampled, tree_size)
    for module in (growth, sampling, tree):
        monkeypatch.setattr(module, "has_queue", lambda device: True)
    waits = write(target, proposer, prompts, 24, sampled, tree_size)
    assert waits.texts == looks.texts == plain.texts
    assert [cycle.tokens for cycle in waits.cycles] == [cycle.tokens for cycle in looks.cycles]
    assert [cycle.depth for cycle in waits.cycles] == [cycle.depth for cycle in looks.cycles]
