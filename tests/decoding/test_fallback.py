"""Plain steps while drafting loses, and drafting again when it pays."""

import pytest
import torch
from tiny import Recorder, new_state, prompt_of, random_drafter, soft_target, tiny_target, write

from coral.decoding.cycle import generate
from coral.decoding.fallback import Fallback
from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.decoding.state import Cycle
from coral.tree import DraftTree, TreeSize

TREE_SIZE = TreeSize(top_k=3, max_depth=3, num_nodes=7)


class Scripted(Fallback):
    """Rests in the cycles it is told to."""

    def __init__(self, proposer, resting):
        super().__init__(proposer)
        self.script = iter(resting)

    def _rests(self):
        return next(self.script, False)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=3)])
def test_a_rest_leaves_no_gap_in_what_the_drafter_reads(sampling):
    """Stops features of plain steps that are lost, doubled or out of order when drafting goes on."""
    target = soft_target(40)
    resting = [True, False, True, True, True, False, False, True, True]
    recorder = Recorder(Scripted(random_drafter(target), resting))
    states = [new_state(target, prompt_of(n), 20, sampling, sequence_id=i) for i, n in enumerate((7, 1, 12))]
    lengths = []
    for _ in generate(target, Before(recorder, lengths), states, TREE_SIZE):
        pass
    for i, state in enumerate(states):
        expected = write(target, Plain(), [prompt_of(n) for n in (7, 1, 12)], 20, sampling).texts[i]
        assert state.tokens == expected
        for cycle, (tree, length) in enumerate(zip(recorder.trees[i], lengths[i], strict=True)):
            if resting[cycle : cycle + 1] != [True] and cycle > 0:
                fresh = new_state(
                    target, state.tokens[:length], state.max_length - length, sampling, sequence_id=i
                )
                fresh.prefill(target, (-1,))
                (again,) = random_drafter(target).propose([fresh], TREE_SIZE)
                assert tree == (again.tokens.tolist(), again.parents.tolist())


class Before:
    """Notes the lengths of the texts before each cycle."""

    def __init__(self, proposer, lengths):
        self.proposer, self.lengths, self.layers = proposer, lengths, proposer.layers

    def propose(self, states, tree_size):
        for state in states:
            while len(self.lengths) <= state.sequence_id:
                self.lengths.append([])
            self.lengths[state.sequence_id].append(len(state.tokens))
        return self.proposer.propose(states, tree_size)


class Acted:
    """A run of cycles that take and bring what is said, without any model."""

    def __init__(self, **options):
        self.target = tiny_target()
        self.state = new_state(self.target, prompt_of(5), 10_000)
        self.proposer = Fallback(Chain(), **options)

    def run(self, tokens, emitted, seconds, plain=1.0):
        """Write `tokens` tokens; returns the time and whether each cycle drafted."""
        total, drafted = 0.0, []
        end = len(self.state.tokens) + tokens
        while len(self.state.tokens) < end:
            (tree,) = self.proposer.propose([self.state], TREE_SIZE)
            drafts = len(tree) > 1
            count = emitted if drafts else 1
            self.state.tokens += [0] * count
            took = seconds if drafts else plain
            self.state.cycle = Cycle([0] * count, len(tree) - 1, count - 1, 1, int(drafts), False, 0, 0, took)
            total, drafted = total + took, [*drafted, drafts]
        return total, drafted


class Chain:
    layers = ()

    def propose(self, states, tree_size):
        return [DraftTree(torch.zeros(2, dtype=torch.int64), torch.tensor([-1, 0]), torch.zeros(2))]


def test_a_drafter_that_always_misses_costs_a_few_percent():
    """Stops a hostile drafter from slowing a text down."""
    tokens = 24 * 128
    total, drafted = Acted().run(tokens, emitted=1, seconds=1.6)
    assert total <= 1.05 * tokens
    assert sum(drafted[-600:]) > 0  # and it is tried again: a rest is 512 at most


def test_a_drafter_that_pays_is_not_held_back():
    """Stops a policy that rests while drafting is faster."""
    total, drafted = Acted(window=4, probe=2).run(400, emitted=3, seconds=1.6)
    assert drafted.count(False) == 2  # what a plain step costs has to be learnt
    assert total < 400 / 3 * 1.6 + 2


def test_drafting_comes_back_when_it_pays_again():
    """Stops a text that turned hard once from being written plainly to its end."""
    acted = Acted()
    acted.run(300, emitted=1, seconds=1.6)
    _, drafted = acted.run(2000, emitted=4, seconds=1.6)
    assert all(drafted[-100:])


def test_a_slow_first_plain_step_is_no_measure():
    """Stops a step that compiled or warmed up, minutes long, from making any drafter look fast."""
    acted = Acted()
    acted.proposer._plain.append(60.0)
    acted.run(40, emitted=1, seconds=1.6)
    acted.proposer._plain.append(1.0)
    acted.proposer._plain.append(1.0)
    total, _ = acted.run(3000, emitted=1, seconds=1.6)
    assert total < 1.05 * 3000
