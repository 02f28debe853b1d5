"""What a forward costs by family, natively and by transformers' own code: `python benchmarks/families.py`.

Random weights in bfloat16 at the shape of a small real model, behind 200 tokens (Mistral and Gemma 3 see the
last 128). Both ways verify the same chains in turn, so that a slow moment of the machine hits both. Prints
a Markdown table: milliseconds of a plain step, and v(n), a forward over n nodes over a plain step.
"""

from __future__ import annotations

import shlex
import sys
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
)

from coral.bench.costs import verify_seconds
from coral.bench.environment import commit, environment
from coral.target.attention import GROUPED_SDPA
from coral.target.target import Target

SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
WINDOW = 128
CONFIGS: dict[str, PreTrainedConfig] = {
    "Phi-3": Phi3Config(**SHAPE, sliding_window=None),
    "OLMo-2": Olmo2Config(**SHAPE),
    f"Mistral, window {WINDOW}": MistralConfig(**SHAPE, sliding_window=WINDOW),
    "Qwen3": Qwen3Config(**SHAPE, head_dim=64),
    "Gemma 3": Gemma3TextConfig(
        **SHAPE, head_dim=64, query_pre_attn_scalar=64, sliding_window=WINDOW, sliding_window_pattern=6
    ),
}
ROWS, CONTEXT, ROUNDS = (1, 4, 8), 200, 2
WAYS = ("native", "transformers")


def milliseconds(config: PreTrainedConfig) -> dict[str, dict[int, float]]:
    """Medians of a forward by way and number of nodes: the least of some rounds, in which ways take turns."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=GROUPED_SDPA, dtype=torch.bfloat16)
    target, prefix = Target(model), torch.randint(config.vocab_size, (CONTEXT + 1,)).tolist()
    targets = {way: target.on(way) for way in WAYS}
    least: dict[str, dict[int, float]] = {way: dict.fromkeys(ROWS, float("inf")) for way in WAYS}
    for _ in range(ROUNDS):
        for way, runs in targets.items():
            for rows, seconds in verify_seconds(runs, ROWS, prefix).items():
                least[way][rows] = min(least[way][rows], 1000 * seconds)
    return least


def main() -> None:
    here = environment()
    print("| family | native, ms | v(4) | v(8) | transformers, ms | v(4) | v(8) | over transformers |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for family, config in CONFIGS.items():
        found = milliseconds(config)
        cells = [
            cell
            for way in WAYS
            for cell in (f"{found[way][1]:.1f}", *(f"{found[way][n] / found[way][1]:.2f}" for n in ROWS[1:]))
        ]
        ratio = found["transformers"][1] / found["native"][1]
        print(f"| {family} | {' | '.join(cells)} | {ratio:.1f}x |", flush=True)
    facts = "; ".join(f"{name}: {value}" for name, value in here.items())
    print(f"\n`{shlex.join(['python', *sys.argv])}`, commit {commit()}. {facts}.")


if __name__ == "__main__":
    main()
