"""Plain steps while drafting loses, and drafting again when it pays."""

import pytest
import torch
from tiny import Recorder, new_state, prompt_of, random_drafter, soft_target, tiny_target, write

from coral.decoding.cycle import generate
from coral.decoding.fallback import Fallback, Record
from coral.decoding.plain import Plain
from coral.decoding.row_costs import RowCosts
from coral.decoding.sampling import Sampling
from coral.decoding.state import Cycle
from coral.tree import DraftTree, TreeSize

TREE_SIZE = TreeSize(top_k=3, max_depth=3, num_nodes=7)
FREE = RowCosts({1: 1.0, 64: 1.0}, {1: 0.0, 64: 0.0})


class Script(Record):
    """Rests in the cycles it is told to."""

    def __init__(self, resting):
        super().__init__(8, 2, 16, 512)
        self.script = iter(resting)

    def rests(self, promising=True, least=0):
        return next(self.script, False)


def scripted(proposer, resting):
    fallback, script = Fallback(proposer, lambda: FREE), Script(resting)
    fallback.records.default_factory = lambda: script
    return fallback


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=3)])
def test_a_rest_leaves_no_gap_in_what_the_drafter_reads(sampling):
    """Stops features of plain steps that are lost, doubled or out of order when drafting goes on."""
    target = soft_target(40)
    resting = [True, False, True, True, True, False, False, True, True]
    recorder = Recorder(scripted(random_drafter(target), resting))
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
    acted.proposer.records[1].plain.append(60.0)
    acted.run(40, emitted=1, seconds=1.6)
    acted.proposer.records[1].plain.append(1.0)
    acted.proposer.records[1].plain.append(1.0)
    total, _ = acted.run(3000, emitted=1, seconds=1.6)
    assert total < 1.05 * 3000


def test_what_one_text_gains_says_nothing_of_a_batch():
    """Stops a batch in which drafting loses from drafting on, or one text from resting for its sake; and what
    is learnt of plain steps that a server took by itself, or is not where a text has just come.
    """
    fallback = Fallback(Chain(), lambda: FREE)
    states = [new_state(tiny_target(), prompt_of(5, seed=i), 10_000) for i in range(3)]

    def act(live, emitted, seconds, asked=True):
        drafted = bool(asked and len(fallback.propose(live, TREE_SIZE)[0]) > 1)
        for state in live:
            count = emitted if drafted else 1
            state.tokens += [0] * count
            state.cycle = Cycle([0] * count, 1, count - 1, 1, 1, False, 0, 0, seconds if drafted else 1.0)
        return drafted

    for _ in range(60):
        alone = act(states[:1], emitted=3, seconds=1.5)
    for _ in range(60):
        together = act(states[:2], emitted=3, seconds=4.0)
    assert alone and not together and act(states[:1], emitted=3, seconds=1.5)
    plain = [*fallback.records[1].plain]
    act(states[:1], 1, 9.0, asked=False)
    drafted = len(fallback.records[3].drafted)
    act(states, 3, 1.5)
    assert [*fallback.records[1].plain] == plain and len(fallback.records[3].drafted) == drafted
    fresh = new_state(tiny_target(), prompt_of(4), 100)
    act([*states[:2], fresh], 3, 1.5)
    assert len(fallback.records[3].drafted) == drafted + 1
