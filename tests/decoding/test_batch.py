"""Training answers are written in batches; each must be the answer that plain decoding writes alone."""

import pytest
import torch
from tiny import Target, new_state, prompt_of, tiny_model, tiny_target

from coral.decoding import batch
from coral.decoding.cycle import generate
from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.target.grouped_sdpa import GROUPED_SDPA
from coral.tree import TreeSize

NEW = 14
PROMPTS = [prompt_of(length, seed=i) for i, length in enumerate((5, 17, 1, 9, 9, 3))]
SAMPLINGS = [Sampling(), Sampling(0.8, seed=4), Sampling(1.0, top_p=0.9, seed=4), Sampling(0.8, seed=4),
             Sampling(), Sampling(1.0, top_k=5, seed=1)]  # fmt: skip
SEQUENCES = [10, 11, 12, 11, 14, 2**40]


def alone(target, index, new=NEW):
    """The answer of one prompt by plain decoding."""
    options = {"sampling": SAMPLINGS[index], "sequence_id": SEQUENCES[index], "eos_ids": target.eos_ids}
    state = new_state(target, PROMPTS[index], new, **options)
    for _ in generate(target, Plain(), [state], TreeSize(4, 4, 15)):
        pass
    return state.written


def together(target, order, new=NEW):
    pick = [[items[i] for i in order] for items in (PROMPTS, SAMPLINGS, SEQUENCES)]
    return batch.write_padded(target, *pick, new)


@pytest.mark.parametrize("kind", ["llama", "mistral-sliding", "qwen2-sliding", "phi3", "olmo2", "gemma3"])
def test_batch_equals_one_by_one(kind):
    """Stops padding that is attended to or counted as a position, and rows that share noise."""
    target = tiny_target(kind)
    assert together(target, range(6)) == [alone(target, i) for i in range(6)]


def test_batch_and_order_do_not_matter():
    """Stops an answer that depends on what else is in the batch."""
    target = tiny_target()
    answers = together(target, range(6))
    for order in ([5, 3, 1, 0, 2, 4], [2], [4, 0], [1, 1, 1]):
        assert together(target, order) == [answers[i] for i in order]


def test_rows_that_end_leave_the_batch():
    """Stops an answer that goes on behind its end token, and rows mixed up when others have left."""
    free = [alone(tiny_target(), i) for i in range(6)]
    ends = [free[0][3], free[1][7]]
    target = Target(tiny_model(attention=GROUPED_SDPA, eos_token_id=ends))
    assert target.eos_ids == set(ends)
    answers = together(target, range(6))
    assert answers == [alone(target, i) for i in range(6)]
    assert len({len(answer) for answer in answers}) > 2
    for answer, whole in zip(answers, free, strict=True):
        cut = next((i for i, token in enumerate(whole) if token in ends), NEW)
        assert answer == whole[: cut + 1]


def test_nothing_to_write():
    """Stops a crash on an empty batch, an empty prompt, or a limit of no tokens."""
    target = tiny_target()
    assert batch.write_padded(target, [], [], [], 5) == []
    assert together(target, [0, 1], new=0) == [[], []]
    answers = batch.write_padded(target, [[], PROMPTS[0]], [Sampling()] * 2, [0, 1], 5)
    assert answers[0] == [] and answers[1] == alone(target, 0, new=5)


def test_half_precision_keeps_its_dtype():
    """Stops a float32 mask or padding that makes a bfloat16 target fail."""
    target = Target(tiny_model().to(torch.bfloat16))
    assert [len(answer) for answer in together(target, [0, 1], new=3)] == [3, 3]
