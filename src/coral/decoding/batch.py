"""Plain decoding of many prompts at once by transformers' code, where a target has no native forward.

Each answer is a fixed function of (prompt, seed, sequence id), up to the rounding of another batch shape.
Natively `serving.engine` writes them, and an answer is bit for bit the one that is written alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coral.decoding.sampling import Sampling
from coral.target.ids import check_scores
from coral.target.target import Target


@torch.inference_mode()
def write_padded(
    target: Target,
    prompts: Sequence[list[int]],
    samplings: Sequence[Sampling],
    sequence_ids: Sequence[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Answer every prompt: at most `max_new_tokens` ids each, the end token included when it was written.

    The rows of a batch are padded on the left and share one cache; those that have ended leave it as soon as
    they are a quarter.
    """
    from transformers import DynamicCache

    answers: list[list[int]] = [[] for _ in prompts]
    rows = [i for i, prompt in enumerate(prompts) if prompt and max_new_tokens > 0]
    if not rows:
        return answers
    width = max(len(prompts[i]) for i in rows)
    padding = [width - len(prompts[i]) for i in rows]
    ids = torch.tensor([[0] * pad + prompts[i] for i, pad in zip(rows, padding, strict=True)])
    real = torch.arange(width)[None, :] >= torch.tensor(padding)[:, None]  # [B, keys] bool
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    cache: Any = DynamicCache()
    ended: set[int] = set()
    while True:
        features = target.decoder(
            input_ids=ids.to(target.device),
            attention_mask=real.long().to(target.device),
            position_ids=positions.to(target.device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        scores = target.head(features[:, -1])
        if not any(answers):
            check_scores(target, scores)
        tokens = _sample(scores, positions[:, -1] + 1, rows, samplings, sequence_ids)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row not in ended:
                answers[row].append(token)
                if token in target.eos_ids or len(answers[row]) == max_new_tokens:
                    ended.add(row)
        alive = [j for j, row in enumerate(rows) if row not in ended]
        if not alive:
            return answers
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        real = torch.cat([real, torch.ones(len(rows), 1, dtype=torch.bool)], 1)
        if len(alive) <= 0.75 * len(rows):
            index = torch.tensor(alive)
            cache.batch_select_indices(index.to(target.device))
            rows, ids, positions, real = [rows[j] for j in alive], ids[index], positions[index], real[index]


def _sample(
    logits: Tensor,
    positions: Tensor,
    rows: Sequence[int],
    samplings: Sequence[Sampling],
    sequence_ids: Sequence[int],
) -> Tensor:
    """[B, V] logits -> [B] tokens on the CPU; rows of the same sampling share one call."""
    groups: dict[Sampling, list[int]] = {}
    for j, row in enumerate(rows):
        groups.setdefault(samplings[row], []).append(j)
    tokens = torch.empty(len(rows), dtype=torch.int64)
    for sampling, members in groups.items():
        here = torch.tensor(members)
        ids = [sequence_ids[rows[j]] for j in members]
        tokens[here] = sampling.sample(logits[here.to(logits.device)], positions[here], ids).cpu()
    return tokens
