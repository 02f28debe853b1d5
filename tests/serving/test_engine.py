"""Many texts at once: each is the one that is written alone, whatever comes, goes and waits beside it."""

from __future__ import annotations

import random
from copy import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Target, new_state, prompt_of, random_drafter, tiny_model, tiny_target

from coral.decoding.cycle import generate
from coral.decoding.fallback import Fallback
from coral.decoding.log_probs import LogProbs, Scored
from coral.decoding.merged import Merged
from coral.decoding.plain import Plain
from coral.decoding.row_costs import ASSUMED
from coral.decoding.sampling import Sampling
from coral.drafters.feature.propose import Feature
from coral.drafters.heads.in_context import InContextHead
from coral.drafters.lookup import NGram
from coral.errors import CoralError
from coral.serving.engine import Engine
from coral.tree import TreeSize

TREE_SIZE = TreeSize(top_k=3, max_depth=4, num_nodes=10)
SYSTEM = prompt_of(24, seed=9)
PROMPTS = [prompt_of(5), SYSTEM + prompt_of(7), SYSTEM + prompt_of(3), prompt_of(1), SYSTEM + prompt_of(19),
           prompt_of(40), SYSTEM, prompt_of(12)]  # fmt: skip
SAMPLINGS = [Sampling(), Sampling(1.0, seed=4), Sampling(0.7, top_p=0.8, seed=5), Sampling(0.8, seed=4)]
PROPOSERS = {
    "plain": lambda target: Plain(),
    "ngram": lambda target: NGram(2),
    "drafter": lambda target: Feature(drafter(target), target),
    "fallback, in context, merged": lambda target: Fallback(
        Merged(Feature(drafter(target), target, InContextHead(target, 12)), NGram(2))
    ),
    "fallback": lambda target: Fallback(Feature(drafter(target), target), lambda: ASSUMED),
}


def drafter(target: Target):
    return random_drafter(target).drafter.to(target.dtype)


@cache
def native(dtype: torch.dtype = torch.float32) -> Target:
    sizes = {"hidden_size": 32, "head_dim": 16, "intermediate_size": 64, "eos_token_id": [4, 9]}
    target = Target(tiny_model(**sizes).to(dtype)).on("native")
    if target._native is None:
        pytest.skip("no C++ compiler")
    return target


TARGETS = {"native": native, "native bfloat16": lambda: native(torch.bfloat16), "float32": tiny_target}


def begin(target: Target, number: int):
    """Text `number`, with a prompt, sampling, length and stop of its own."""
    stop = (lambda written: sum(written[-2:]) % 11 == 0) if number % 3 == 2 else None
    return new_state(
        target, PROMPTS[number % len(PROMPTS)], 3 + 5 * number % 17, SAMPLINGS[number % len(SAMPLINGS)],
        sequence_id=number, eos_ids=target.eos_ids, stop=stop,
    )  # fmt: skip


@cache
def alone(name: str, number: int) -> list[int]:
    """What plain decoding writes of a text with nothing beside it."""
    target = TARGETS[name]()
    state = begin(target, number)
    for _ in generate(target, Plain(), [state], TREE_SIZE):
        pass
    return state.written


def engine_of(name: str, proposer: str = "plain", **options):
    target = TARGETS[name]()
    return Engine(target, PROPOSERS[proposer](target), TREE_SIZE, **options)


def run(engine: Engine, states):
    """Write them to their ends; what each step returned."""
    for state in states:
        engine.submit(state)
    steps = []
    while engine.waiting + engine.running:
        steps.append(engine.step())
    return steps


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**32), st.integers(1, 9), st.sampled_from([1, 7, 64]), st.booleans(),
)  # fmt: skip
def test_a_text_is_the_same_whatever_runs_beside_it(
    name: str, proposer: str, seed: int, at_once: int, chunk: int, bounded: bool
) -> None:
    """Stops rows, noise, features or a drafter's memory of a neighbour that came, left or was cancelled."""
    draw = random.Random(seed)
    memory = 2.2 * engine_of(name, proposer, memory=1e9)._row_bytes * 90 if bounded else None
    engine = engine_of(name, proposer, at_once=at_once, chunk=chunk, memory=memory, kept=3)
    coming = draw.sample(range(24), draw.randrange(1, 13))
    states, written, cancelled = {}, {}, set()
    while coming or engine.waiting + engine.running:
        for _ in range(min(draw.randrange(4), len(coming))):
            number = coming.pop()
            states[number] = begin(engine.target, number)
            engine.submit(states[number])
        for state, cycle in engine.step():
            written.setdefault(state.sequence_id, []).extend(cycle.tokens)
        assert engine.running <= at_once and engine.used <= (memory or 0)
        if states and draw.random() < 0.1:
            engine.cancel(states[number := draw.choice([*states])])
            cancelled |= set() if states[number].done else {number}
    for number, state in states.items():
        whole = alone(name, number)
        assert state.written == written.get(number, [])
        assert state.written == (whole[: len(state.written)] if number in cancelled else whole)


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("name", TARGETS)
def test_a_reused_prefix_gives_the_same_text(name: str, proposer: str) -> None:
    """Stops copied rows of a wrong text or number, and a drafter that reads none of them or some twice."""
    engine = engine_of(name, proposer)
    for number in (4, 1, 2, 6):
        run(engine, [state := begin(engine.target, number)])
        assert state.written == alone(name, number)
    assert engine.reused_tokens == 3 * (len(SYSTEM) - 1) - 1  # the last prompt is all system, and has a root
    first = new_state(engine.target, PROMPTS[5], 12)
    run(engine, [first])
    before, turn = engine.reused_tokens, [*first.tokens, *prompt_of(4)]
    run(engine, [second := new_state(engine.target, turn, 12)])
    assert engine.reused_tokens - before == len(first.tokens) - 1 and len(engine._kept) == 5
    alone_again = new_state(engine.target, turn, 12)
    for _ in generate(engine.target, Plain(), [alone_again], TREE_SIZE):
        pass
    assert second.written == alone_again.written


def test_texts_that_come_together_read_a_shared_prompt_once() -> None:
    """Stops n answers of one long prompt that each read it."""
    engine = engine_of("native", "drafter", chunk=16)
    states = [new_state(engine.target, PROMPTS[5], 3, sequence_id=i) for i in range(4)]
    run(engine, states)
    assert engine.prompt_tokens - engine.reused_tokens < 40 + 3 * 16
    assert len({tuple(state.written) for state in states}) == 1


def test_a_long_prompt_holds_the_others_for_one_chunk_at_a_time() -> None:
    """Stops a prompt that is read to its end while texts that are live, or a short prompt, wait."""
    engine = engine_of("native", chunk=8)
    engine.submit(short := new_state(engine.target, prompt_of(3), 12))
    assert [state for state, _ in engine.step()] == [short]
    engine.submit(long := new_state(engine.target, prompt_of(60, seed=2), 4))
    engine.submit(late := new_state(engine.target, prompt_of(4, seed=3), 12))
    rows = []
    for _ in range(3):
        assert short in [state for state, _ in engine.step()]
        rows.append(long.unread.end)
    assert rows == [8, 13, 21] and len(late.written) == 2


def test_a_cancelled_text_makes_room_within_a_cycle() -> None:
    """Stops clients that have gone and hold a place."""
    engine = engine_of("native", at_once=2)
    states = [new_state(engine.target, prompt_of(5, seed=i), 20) for i in range(4)]
    for state in states:
        engine.submit(state)
    engine.step()
    engine.cancel(states[0])
    engine.cancel(states[2])
    engine.cancel(states[2])
    assert [state for state, _ in engine.step()] == [states[1], states[3]] and engine.running == 2


def test_memory_is_bounded_and_the_first_come_first() -> None:
    """Stops a text that outgrows the memory, waits for ever, or is overtaken by a smaller one."""
    row = engine_of("native", "drafter", memory=1e9)._row_bytes
    engine = engine_of("native", "drafter", memory=100 * row)
    with pytest.raises(CoralError, match=r"tokens takes .* GB of keys and values, but"):
        engine.submit(new_state(engine.target, prompt_of(30), 60))
    states = [new_state(engine.target, prompt_of(9, seed=i), new) for i, new in enumerate((40, 12, 9, 5))]
    run_ = run(engine, states)
    assert [[*map(id, (state for state, _ in step))] for step in run_[:1]] == [[id(states[0])]]
    first = {id(state): i for i, step in reversed([*enumerate(run_)]) for state, _ in step}
    assert [first[id(state)] for state in states] == sorted(first.values())
    assert engine.used <= 100 * row and engine._kept


def test_row_bytes_are_those_of_the_caches() -> None:
    """Stops accounting that leaves the drafter's keys and values out."""
    target = native()
    assert engine_of("native", memory=1e9)._row_bytes == 2 * 2 * 2 * 16 * 4 + 32 * 4
    assert engine_of("native", "drafter", memory=1e9)._row_bytes > 2 * 2 * 2 * 16 * 4 + 32 * 4
    state = new_state(target, prompt_of(4), 2)
    assert state.cache.row_bytes == 0


def test_log_probs_are_bit_for_bit_those_of_alone() -> None:
    """Stops numbers that depend on the rows beside, and a prompt that is scored by another one's rows."""

    def scored(count: int) -> list[list[Scored]]:
        engine, states = engine_of("native", "drafter", chunk=7), []
        for number in range(count):
            states.append(begin(engine.target, number))
            states[-1].log_probs = LogProbs(3, prompt=number % 2 == 0)
            states[-1].drafts = number % 3 > 0
        run(engine, states)
        assert all(state.written == alone("native", number) for number, state in enumerate(states))
        return [state.log_probs.take() for state in states]

    together = scored(6)
    for number in range(6):
        assert together[: number + 1] == scored(number + 1)
    lengths = [
        len(alone("native", n)) + (n % 2 == 0) * (len(PROMPTS[n % len(PROMPTS)]) - 1) for n in range(6)
    ]
    assert [*map(len, together)] == lengths


def test_no_row_is_padded() -> None:
    """Stops rows that are computed for no text, and a counter that does not count them."""
    engine = engine_of("native", "drafter")
    run(engine, [begin(engine.target, number) for number in range(6)])
    assert engine.padded_rows == 0
    fixed = copy(engine.target)
    fixed._forward = type("Fixed", (), {"pads": True, "sizes": (1, 8)})()
    assert [fixed.padding(counts) for counts in ([1], [5], [9], [5, 5])] == [0, 3, 0, 0]


def test_what_cannot_be_written_is_refused_before_it_stands_beside_others() -> None:
    """Stops one bad prompt that ends the texts of others, and a step that failed that ends the service."""
    engine = engine_of("native", "drafter")
    with pytest.raises(CoralError, match="token id 999"):
        engine.submit(new_state(engine.target, [1, 999], 4))
    engine.submit(new_state(engine.target, prompt_of(3), 4))
    engine.clear()
    run(engine, [state := begin(engine.target, 1)])
    assert state.written == alone("native", 1)
    with pytest.raises(CoralError, match="at its end"):
        engine.submit(state)
