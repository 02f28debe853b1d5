"""What memory training takes at rows of 1,024 to 8,192 tokens, for a small and a wider target.

    python benchmarks/lengths.py --output benchmarks/DATE-lengths

The parts of an update are measured one by one, each case in its own process: the target's features of a row
that is one document, and of one packed with documents of 300 tokens; then a step of the recipe `coral`
(forward and backward) on them, plain and with `checkpoint_steps`. For comparison packed rows are also read as
before, under a mask of L x L. Weights are random, every token is trained. Memory is the process's largest
resident size less what it was before, freed blocks going back to the kernel at once.

The last column is what doubling L from 4,096 adds over what doubling it from 2,048 adds: 2.0 is a straight
line, 4.0 a parabola.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from dense import _resident
from publish import header, reproduce, save
from transformers import LlamaConfig, LlamaForCausalLM

from coral.data.features import FeatureBatch
from coral.drafters.feature.learn import Learner
from coral.drafters.feature.network import Drafter, DrafterConfig
from coral.target.grouped_sdpa import GROUPED_SDPA
from coral.target.target import Target
from coral.training.recipe import load_recipe

LENGTHS = (1024, 2048, 4096, 8192)
DOCUMENT = 300
SIZES: dict[int, dict[str, int]] = {
    256: {"intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2},
    1024: {"intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8},
}
PARTS = {
    "document": "target, one document",
    "packed": "target, packed",
    "packed-mask": "target, packed, mask of L x L",
    "step": "drafter",
    "checkpointed": "drafter, `checkpoint_steps`",
}


def measure(part: str, hidden: int, length: int) -> float:
    """Peak memory in MB (10^6 bytes) of one part of an update, in this process."""
    ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD, from malloc.h
    torch.manual_seed(0)
    sizes = SIZES[hidden] | {"hidden_size": hidden, "num_hidden_layers": 2, "vocab_size": 32000}
    config = LlamaConfig(**sizes, max_position_embeddings=8192)
    kernel = "sdpa" if part == "packed-mask" else GROUPED_SDPA
    target = Target(LlamaForCausalLM._from_config(config, attn_implementation=kernel))
    recipe = load_recipe("coral", ["checkpoint_steps=true"] if part == "checkpointed" else [])
    learner = Learner(Drafter(DrafterConfig.for_target(config)), recipe, recipe.precision)

    def once(length: int) -> None:
        ids = torch.arange(length)[None] % 32000
        starts = torch.arange(length)[None] % DOCUMENT == 0 if part != "document" else None
        if part in ("document", "packed", "packed-mask"):
            target.states(ids, starts)
            return
        features, embeddings = torch.randn(2, 1, length, hidden)
        batch = FeatureBatch([0], ids, torch.ones_like(ids, dtype=torch.bool), starts, features, embeddings)
        learner(batch, target.head_weight, None, torch.Generator().manual_seed(0)).loss.backward()
        learner.zero_grad()

    once(64)  # what the first product of a process loads is not the length's
    before = _resident("VmRSS")
    once(length)
    return (_resident("VmHWM") - before) / 1e6


def markdown(results: dict[str, Any]) -> str:
    where, rows = results["environment"], results["rows"]
    lines = [
        f"Memory of the parts of a training update, one row of L tokens, {results['steps']} draft steps, "
        f"float32, V = 32,000, target of 2 layers, packed documents of {DOCUMENT} tokens. "
        f"{where['hardware']}, {where['threads']} threads, torch {where['torch']}. MB are 10^6 bytes.",
        "",
        f"| hidden size | part | {' | '.join(f'L = {x:,}' for x in LENGTHS)} | growth |",
        "|---:|---|" + "---:|" * (len(LENGTHS) + 1),
    ]
    for hidden, part in product(SIZES, PARTS):
        found = {row["length"]: row["mb"] for row in rows if (row["hidden"], row["part"]) == (hidden, part)}
        values = [found[length] for length in LENGTHS]
        growth = (values[-1] - values[-2]) / (values[-2] - values[-3])
        cells = " | ".join(f"{value:,.0f} MB" for value in values)
        lines.append(f"| {hidden:,} | {PARTS[part]} | {cells} | {growth:.1f} |")
    return "\n".join([*lines, "", reproduce(results), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="Directory for results.json and results.md.")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(measure(*json.loads(options.case)))
        return
    if options.output is None:
        parser.error("give --output, a directory for the results.")
    rows = []
    for hidden, part, length in product(SIZES, PARTS, LENGTHS):
        command = [sys.executable, __file__, "--case", json.dumps([part, hidden, length])]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        mb = float(ended.stdout.splitlines()[-1])
        rows.append({"hidden": hidden, "part": part, "length": length, "mb": mb})
        print(json.dumps(rows[-1]), flush=True)
    results = {**header(), "steps": load_recipe("coral").steps, "rows": rows}
    save(options.output, results, markdown(results))


if __name__ == "__main__":
    main()
