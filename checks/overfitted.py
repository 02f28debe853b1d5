"""A tiny random Llama and an EAGLE-3 drafter that knows its texts by heart, made in seconds: a random one
would have nothing accepted, whatever is wrong with it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tiny_gguf import byte_level, write_gguf
from transformers import LlamaConfig, LlamaForCausalLM

from coral.bench.methods import ours
from coral.data.features import feature_batch, frequencies
from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.drafters import checkpoint, kinds
from coral.drafters.eagle3.fused_learn import FusedLearner
from coral.target.gguf.rope import LLAMA3, llama3_divisors
from coral.target.record import TargetRecord
from coral.target.target import Target
from coral.tree import TreeSize

PROMPT, LENGTH, LAYERS = 8, 64, (2, 4, 5)
ORIGINAL, SCALING = 64, {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Of the rotary embedding, as in Llama 3.1."""


class Pair(NamedTuple):
    """target: as we load it; gguf, drafter: the GGUF file of it and a checkpoint's directory."""

    target: Target
    gguf: Path
    drafter: Path
    prompts: list[list[int]]


def make(directory: Path, texts: int = 6, updates: int = 150) -> Pair:
    """Write both into a directory, and tell what the drafter has learnt by heart."""
    torch.manual_seed(0)
    vocabulary = byte_level("smollm", ["a coral reef"])
    model = random_llama(len(vocabulary["tokens"]))
    divisors = llama3_divisors(10000.0, 16, ORIGINAL, **SCALING).astype(np.float32)
    gguf = write_gguf(directory / "target.gguf", model, vocabulary, tensors={LLAMA3: divisors})
    target = Target(model, name=str(gguf))
    prompts = torch.randint(5, target.vocab_size, (texts, PROMPT)).tolist()
    write = ours(target, Plain(), TreeSize(1, 0, 1))
    rows = [
        {
            "input_ids": [*prompt, *write(prompt, Sampling(), 0, LENGTH).tokens],
            "loss_mask": [0] * PROMPT + [1] * LENGTH,
            "document_starts": [0],
        }
        for prompt in prompts
    ]
    drafter = learnt(target, rows, updates)
    checkpoint.save(drafter, directory / "drafter", target=TargetRecord.of(target))
    return Pair(target, gguf, directory / "drafter", prompts)


def random_llama(vocab_size: int) -> Any:
    """Of eight layers, sure enough of itself that float32 rounds nothing into another token."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=8,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-5,
            max_position_embeddings=1024, rope_parameters=rope | SCALING,
            tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.6 if "embed" in name else 1.4 * parameter.shape[1] ** -0.5)
    return model


def learnt(target: Target, rows: list[dict[str, Any]], updates: int) -> Any:
    """A drafter of 160 of the target's ids, trained on rows that it is to know."""
    kind = kinds.find("eagle3")
    options: Any = kind.Options()
    made = replace(options.drafter, layers=LAYERS, draft_vocab_size=160)
    config = replace(options, drafter=made, steps=4)
    batch = feature_batch(target, rows, range(len(rows)), LAYERS)
    drafter: Any = kind.new(target, config, batch, 0, lambda: frequencies(rows, target.vocab_size))
    learner = FusedLearner(drafter.train(), config)
    optimiser = torch.optim.Adam(learner.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        outcome = learner(batch, target.head_weight, None, generator)
        (outcome.loss / learner.count(batch)).backward()
        optimiser.step()
        optimiser.zero_grad()
    return drafter.eval()
