"""`wrong` must mean a bug and `near_tie` rounding: confusing them makes `identical` worthless."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from coral.bench.equality import is_near_tie, references, verdict_of
from coral.decoding.sampling import Sampling
from coral.target.target import Target

V = 31


def rows(gap: float, error: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 logits in which id 3 leads id 7 by `gap`, and the same rounded with an error of `error`."""
    exact = torch.linspace(-4, -2, V)
    exact[3], exact[7] = 2.0, 2.0 - gap
    rounded = exact.clone()
    rounded[::2] += error
    return rounded, exact


def test_greedy() -> None:
    """Stops a tolerance that is too wide (bugs pass as ties) or too narrow (rounding is called a bug)."""
    assert is_near_tie(*rows(gap=0.005), (3, 7), Sampling(), 9, 0)
    assert not is_near_tie(*rows(gap=0.05), (3, 7), Sampling(), 9, 0)
    assert not is_near_tie(*rows(gap=0.005), (3, 8), Sampling(), 9, 0)
    assert not is_near_tie(rows(0.0)[1], rows(0.0)[1] * float("nan"), (3, 7), Sampling(), 9, 0)


def test_noise_is_part_of_the_score() -> None:
    """Stops comparing bare probabilities at T > 0, where the noise decides who is close to whom."""
    sampling = Sampling(temperature=1.0, seed=5)
    _, exact = rows(gap=3.0)
    noise = sampling.noise(torch.tensor([9]), 2, torch.arange(V))[0]
    exact[7] = exact[3] + noise[3] - noise[7] - 0.001  # now 7 scores as high as 3
    exact[torch.arange(V) % 4 != 3] = -50.0
    exact[[11, 15, 19, 23, 27]] = -50.0
    rounded = exact.clone()
    rounded[0] += 0.01
    assert is_near_tie(rounded, exact, (3, 7), sampling, 9, 2)
    assert not is_near_tie(rounded, exact, (3, 7), sampling, 10, 2)  # other position, other noise


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=1.0, top_k=1), Sampling(temperature=1.0, top_p=0.4)],
    ids=["top_k", "top_p"],
)
def test_edges(sampling: Sampling) -> None:
    """Stops calling it wrong when rounding moves an id across a top-k or top-p edge, whatever its score."""
    seeds = [Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed) for seed in range(20)]
    assert all(is_near_tie(*rows(gap=0.001), (3, 7), s, 9, 0) for s in seeds)
    assert not any(is_near_tie(*rows(gap=1.0), (3, 7), s, 9, 0) for s in seeds)


def bf16_target() -> Target:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=V, max_position_embeddings=64,
        initializer_range=0.6, tie_word_embeddings=True,
    )  # fmt: skip
    return Target.load(LlamaForCausalLM(config).to(torch.bfloat16))


def test_planted_bug_is_wrong() -> None:
    """A wrong position id in the accelerated path must not hide behind rounding (20 prompts, so no fluke)."""
    target = bf16_target()
    verdicts = []
    for start in range(20):
        prompt = [(7 * start + 3 * i) % V for i in range(8)]
        plain, planted = list(prompt), list(prompt)
        for tokens, shift in ((plain, 0), (planted, 3)):
            for _ in range(8):
                positions = torch.arange(len(tokens))
                positions[-1] += shift
                logits = target.model(torch.tensor([tokens]), position_ids=positions[None]).logits[0, -1]
                tokens.append(int(logits.argmax()))
        verdicts.append(verdict_of(prompt, plain[8:], planted[8:], Sampling(), 0, references(target)))
    assert verdicts.count("wrong") >= 5
    assert "equal" in verdicts or "near_tie" in verdicts or verdicts.count("wrong") == 20


def test_float32_forgives_nothing() -> None:
    """Stops a tie rule that leaks into float32, where the promise is token for token."""
    assert verdict_of([1], [2, 3], [2, 3], Sampling(), 0, None) == "equal"
    assert verdict_of([1], [2, 3], [2, 4], Sampling(), 0, None) == "wrong"
    assert verdict_of([1], [2, 3], [2], Sampling(), 0, None) == "wrong"
    target = bf16_target()
    assert references(Target(target.model.float())) is None
