"""The head of the ids that the text uses: which are in its window, and that each sequence has its own."""

import gc
import random
import weakref

import pytest
import torch
from tiny import Bushes, V, new_state, prompt_of, random_drafter, tiny_model, tiny_target, tree_of, write

from coral.decoding.cycle import generate
from coral.drafters.feature.propose import Feature
from coral.drafters.heads.full import FullHead
from coral.drafters.heads.in_context import InContextHead, likeliest
from coral.target.target import Target
from coral.tree import TreeSize


def biased_target(special=()):
    """A target whose LM head has a bias and whose end ids are `special`."""
    target = Target(tiny_model())
    target.head_bias = torch.randn(V, generator=torch.Generator().manual_seed(5))
    target.head = lambda features: features @ target.head_weight.T + target.head_bias
    target.eos_ids = frozenset(special)
    return target


def held(head, state):
    """The ids in a window, each once, and its buffers in step with them."""
    window = head.window(state)
    ids = window.ids[: head.size]
    assert len(ids.unique()) == head.size
    assert window.held[:V].nonzero().flatten().tolist() == sorted(ids.tolist())
    torch.testing.assert_close(window.rows[: head.size], head.target.head_weight[ids].detach())
    if window.bias is not None:
        assert torch.equal(window.bias[: head.size], head.target.head_bias[ids])
    return set(ids.tolist())


def test_a_window_of_all_ids_is_the_full_head():
    """Stops scores on another scale than the full head's, rows of another id, and a forgotten bias."""
    target = biased_target([7])
    state, features = new_state(target, prompt_of(9)), torch.randn(5, 16)
    head, full = InContextHead(target, 4000), FullHead(target)
    for _ in range(3):
        ids, scores = head.topk(features, 6, [state], torch.zeros(5))
        expected, values = full.topk(features, 6, [state], torch.zeros(5))
        assert torch.equal(ids, expected) and torch.allclose(scores, values, atol=1e-5)
        state.extend([int(ids[0, 0])])


def test_scores_are_comparable_across_nodes():
    """Stops scores that are normalised over the nodes, or over ids that are not in the window."""
    target, features = biased_target(), torch.randn(5, 16)
    head, state = InContextHead(target, 12), new_state(tiny_target(), prompt_of(9))
    ids, scores = head.topk(features, 99, [state], torch.randn(5))
    assert [set(row) for row in ids.tolist()] == [held(head, state)] * 5
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(5))
    exact = FullHead(target).log_probs(features).gather(1, ids)
    torch.testing.assert_close(scores - scores[:, :1], exact - exact[:, :1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("special", [(), (30, 28)])
def test_the_window_holds_the_ids_that_arrived_last(special):
    """Stops an id that is in twice, or marked as held when it has left, rows that stay behind, buffers that
    move, and an end that leaves the window.
    """
    target, draw = biased_target(special), random.Random(0)
    head, state = InContextHead(target, 10), new_state(tiny_target(), [1, 2, 3])
    window = head.window(state)
    assert held(head, state) >= {1, 2, 3, *special}
    places, room, stream = (window.rows.data_ptr(), window.ids.data_ptr()), 10 - len(special), [1, 2, 3]
    for _ in range(300):
        arrived = [draw.randrange(V) for _ in range(draw.choice([0, 1, 2, 7, 40]))]
        window.add(torch.tensor(arrived, dtype=torch.int64))
        stream += arrived
        last = dict.fromkeys(i for i in reversed(stream) if i not in special)
        assert held(head, state) >= {*list(last)[:room], *special}
    assert places == (window.rows.data_ptr(), window.ids.data_ptr())


def test_ids_arrive_from_the_text_the_tree_and_the_target():
    """Stops a source that is not read, and a cycle that is read at each of its levels."""
    target = biased_target()
    head, state = InContextHead(target, 16), new_state(target, [20, 21, 20, 22])
    assert held(head, state) >= {20, 21, 22}
    window = head.window(state)
    before = window.clock
    assert head.window(state) is window and window.clock == before
    state.tree, state.logits = tree_of([22, 17, 18], [-1, 0, 0]), torch.zeros(2, V)
    state.logits[0, [25, 26, 27]] = 1.0
    state.logits[1, [27, 28, 29]] = 1.0
    assert window.clock == before  # nothing arrives before the next cycle
    state.extend([23, 24])
    assert held(head, state) >= {20, 21, 22, 23, 24, 25, 26, 27, 28, 29}
    arrived = window.arrived.topk(11).indices.tolist()
    assert arrived[:2] == [24, 23] and set(arrived[2:7]) == {25, 26, 27, 28, 29}
    assert set(arrived) >= {17, 18}


def test_another_conversation_is_read_from_its_start():
    """Stops ids that are never seen since a new text is as long as the old one, or shorter."""
    head = InContextHead(biased_target(), 8)
    state = new_state(tiny_target(), [10, 11, 12], 4)
    assert held(head, state) >= {10, 11, 12}
    for prompt in ([10, 14, 15], [16, 17], [16, 17, 18, 19, 20]):
        state.continue_with(prompt, 9)
        assert held(head, state) >= set(prompt)


def test_each_sequence_has_its_own_window():
    """Stops ids of one sequence scored with the rows of another, and windows that outlive their sequences."""
    head, features = InContextHead(biased_target(), 9), torch.randn(6, 16)
    states = [new_state(tiny_target(), prompt) for prompt in ([10, 11, 12], [20, 21, 22])]
    ids, scores = head.topk(features, 4, states, torch.zeros(6))
    alone = [
        head.topk(rows, 4, [state], torch.zeros(3))
        for state, rows in zip(states, features.split(3), strict=True)
    ]
    assert torch.equal(ids, torch.cat([found for found, _ in alone]))
    torch.testing.assert_close(scores, torch.cat([found for _, found in alone]))
    assert [held(head, state) for state in states] == [{*range(6), 10, 11, 12}, {*range(6), 20, 21, 22}]
    windows = [weakref.ref(head.window(state)) for state in states]
    del states
    gc.collect()
    assert [window() for window in windows] == [None, None]


def test_a_state_knows_the_logits_of_its_own_nodes():
    """Stops logits of another sequence or cycle: greedy, each token is the likeliest at one of its nodes."""
    target = tiny_target()
    prompts = [prompt_of(4), prompt_of(7), prompt_of(5)]
    texts = write(target, None, prompts).texts
    states = [new_state(target, prompt, sequence_id=i) for i, prompt in enumerate(prompts)]
    for cycles in generate(target, Bushes(texts), states, TreeSize(3, 4, 10)):
        for state in states if len(cycles) == 3 else ():
            assert state.logits is not None and state.logits.shape[1] == V
            assert state.tokens[-1] in state.logits.argmax(-1).tolist()


def test_what_was_written_is_drafted():
    """Stops a window that does not follow the text, and candidates that never come in."""
    target = tiny_target()
    head = InContextHead(target, 24)
    proposer = Feature(random_drafter(target).drafter, target, head)
    state = new_state(target, prompt_of(5), 12)
    for _ in generate(target, proposer, [state], TreeSize(3, 3, 9)):
        pass
    assert held(head, state) >= set(state.tokens[-6:])
    assert state.logits is not None
    assert held(head, state) >= set(state.logits.topk(2).indices[:5].flatten().tolist())


@pytest.mark.parametrize("vocab_size", [2, 31, 64, 320, 2560])
def test_the_likeliest_ids_are_found(vocab_size):
    """Stops an id of another column or row of the table, and two of the best in one column."""
    logits = torch.randn(50, vocab_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(likeliest(logits, 3), logits.topk(min(3, vocab_size)).indices)
