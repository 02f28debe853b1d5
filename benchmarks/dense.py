"""What one training step costs in memory and time: ours beside the dense formulation.

    python benchmarks/dense.py --output benchmarks/DATE-memory

Dense is how multi-step training is published (HASS, arXiv 2408.15766): at step s the keys of all steps are
concatenated, S*L wide under a dense mask, with key/value heads repeated; target and drafter logits of the
whole batch are made in float32, and all losses are log_softmax and autograd. It is written here from that
description, masks as `coral.drafters.recurrent.unroll` does (the published mask is not exact), and adds the
alignment loss of CORAL, for which the graphs of all steps must be alive at once. `check` shows that both
compute the same loss and gradients.

There is no target model here: features, embeddings and the frozen LM head are random, and every token is
trained. Drafter sizes are those of the toy target. Each case runs in its own process. Memory is the
process's largest resident size less what it was before the step, while freed blocks go back to the kernel at
once, so that neither method pays for the allocator's habits; speed is then taken with freed memory kept, as
`coral train` does. The estimate is the largest sum of bytes of the tensors alive in the dense step, found by
running it on tensors without storage.

Shapes: B sequences, L rows, S steps, V vocabulary, h hidden size.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from publish import header, reproduce, save
from torch import Tensor
from torch.nn.functional import pad, smooth_l1_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coral.data.features import FeatureBatch
from coral.drafters.feature.learn import Learner
from coral.drafters.feature.network import Drafter, DrafterConfig
from coral.drafters.recurrent.alignment import alignment_loss
from coral.drafters.recurrent.drafted import trained_rows
from coral.native.memory import keep_freed_memory
from coral.target.default import TOY
from coral.training.recipe import TrainConfig, load_recipe

METHODS = {"dense": "dense", "ours": "ours", "checkpointed": "ours, `checkpoint_steps`"}


def dense_unroll(drafter: Drafter, embeddings: Tensor, features: Tensor, config: TrainConfig) -> list[Tensor]:
    """Draft features [B,L,h] of every step, each attending to the concatenated keys of all steps so far."""
    length = features.shape[1]
    position = torch.arange(length, device=features.device)
    behind = position[:, None] - position  # [L,L]: how far a column lies behind a row
    kept: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in drafter.layers]
    outputs: list[Tensor] = []
    for step in range(config.steps):
        fed = features
        if outputs:
            drafted = drafter.feedback(outputs[-1].detach() if config.detach else outputs[-1])
            fed = torch.cat([features[:, :1], drafted[:, :-1]], dim=1)
        mask = torch.cat([behind >= step, *(behind == step - j for j in range(1, step + 1))], dim=1)  # [L,sL]
        x = drafter.inputs(embeddings, fed)
        cos, sin = drafter.rotary(x, position[None])
        for layer, (keys, values) in zip(drafter.layers, kept, strict=True):
            q, k, v = layer.qkv(x, cos, sin)
            group = q.shape[1] // k.shape[1]
            keys.append(k.repeat_interleave(group, dim=1))
            values.append(v.repeat_interleave(group, dim=1))
            scores = q @ torch.cat(keys, dim=2).transpose(-1, -2) * q.shape[-1] ** -0.5  # [B,H,L,sL]
            weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32)
            attended = weights.to(v.dtype) @ torch.cat(values, dim=2)
            x = layer.finish(x, attended.transpose(1, 2).flatten(2))
        outputs.append(x)
    return outputs


def dense_loss(
    drafter: Drafter,
    config: TrainConfig,
    batch: FeatureBatch,
    head_weight: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """The loss of `Learner` on the same batch, without packing, noise or a head bias."""
    outputs = dense_unroll(drafter, batch.embeddings, batch.features, config)
    valid = trained_rows(batch.loss_mask, None, config.steps)  # [S,B,L]
    wanted = pad(batch.features, (0, 0, 0, 1))[:, 1:]  # row t predicts the feature of token t+1
    p = (wanted @ head_weight.t()).float().softmax(-1)  # [B,L,V]
    top, ids = p.topk(config.loss.top_k, dim=-1)
    loss = torch.zeros((), device=p.device)
    for step, output in enumerate(outputs):
        log_q = (output @ head_weight.t()).float().log_softmax(-1)  # [B,L,V]
        rows = config.loss.regression * smooth_l1_loss(output, wanted, reduction="none").mean(-1)
        rows = rows - config.loss.divergence_weight * (p * log_q).sum(-1)
        rows = rows - config.loss.top_k_weight * (top * log_q.gather(-1, ids)).sum(-1)
        loss = loss + config.loss.step_decay**step * (rows * valid[step]).sum()
    if config.alignment.kind != "none":
        sequence, row = valid[0].nonzero(as_tuple=True)
        drafts = torch.stack([output[sequence, row] for output in outputs])
        goal, tokens = wanted[sequence, row], batch.input_ids[sequence, row + 2]
        views = drafts, goal, valid[:, sequence, row], sequence, tokens
        aligned = alignment_loss(*views, config.alignment, generator)
        loss = loss + config.alignment.weight * len(row) * aligned
    return loss


def our_loss(
    drafter: Drafter,
    config: TrainConfig,
    batch: FeatureBatch,
    head_weight: Tensor,
    generator: torch.Generator,
) -> Tensor:
    return Learner(drafter, config, config.precision)(batch, head_weight, None, generator).loss


def check(**options: Any) -> None:
    """Raise AssertionError unless both formulations agree in loss and gradients on a small batch; `options`
    are keys of the recipe.
    """
    config = load_recipe("coral", [f"{key}={value}" for key, value in options.items()])
    case = Case("ours", batch=2, length=19, vocab=97)
    drafter, batch, head_weight = setting(case, torch.device("cpu"))
    batch.loss_mask[0, :5] = False
    found = []
    for loss_of in (dense_loss, our_loss):
        drafter.zero_grad()
        loss = loss_of(drafter, config, batch, head_weight, torch.Generator().manual_seed(0))
        loss.backward()
        found.append((loss.detach(), [parameter.grad.clone() for parameter in drafter.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@dataclass(frozen=True)
class Case:
    """One measurement."""

    method: str
    batch: int
    length: int
    vocab: int


def cases(shrink: int) -> Iterator[Case]:
    """The batch that recipes are compared on, then a sweep of L and one of V with a single sequence."""
    shapes = [(4, 2048, 32000), (4, 2048, 128256)]
    shapes += [(1, length, 32000) for length in (512, 1024, 2048, 4096, 8192)]
    shapes += [(1, 2048, vocab) for vocab in (8000, 64000, 128256, 152064)]
    for batch, length, vocab in shapes:
        for method in METHODS:
            if method != "checkpointed" or vocab == 32000:  # what it saves does not depend on V
                yield Case(method, batch, length // shrink, vocab // shrink)


def setting(case: Case, device: torch.device) -> tuple[Drafter, FeatureBatch, Tensor]:
    """A drafter of the toy target's sizes, a random batch [B,L,h] and a random frozen head [V,h]."""
    torch.manual_seed(0)
    sizes = json.loads((TOY / "target" / "config.json").read_text())
    target = argparse.Namespace(**sizes | {"vocab_size": case.vocab})
    with device:
        drafter = Drafter(DrafterConfig.for_target(target))
        shape = (case.batch, case.length, sizes["hidden_size"])
        batch = FeatureBatch(
            rows=list(range(case.batch)),
            input_ids=torch.zeros(shape[:2], dtype=torch.int64),
            loss_mask=torch.ones(shape[:2], dtype=torch.bool),
            document_starts=None,
            features=torch.randn(shape),
            inner=None,
            embeddings=torch.randn(shape),
        )
        return drafter, batch, torch.randn(case.vocab, shape[-1]).mul_(0.1)


def measure(case: Case, keep: bool) -> dict[str, Any]:
    """Run steps of one case in this process: peak memory in GB (10^9 bytes) and trained tokens a second.

    Kept memory breaks into pieces, so a step may take almost twice the memory it needs: `keep` says whether
    there is room for that while speed is measured.
    """
    ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD, from malloc.h
    options = ["checkpoint_steps=true"] if case.method == "checkpointed" else []
    config = load_recipe("coral", options)
    loss_of = dense_loss if case.method == "dense" else our_loss

    def step(case: Case) -> float:
        drafter, batch, head_weight = given if case is wanted else setting(case, torch.device("cpu"))
        start = time.perf_counter()
        loss_of(drafter, config, batch, head_weight, torch.Generator().manual_seed(0)).backward()
        drafter.zero_grad()
        return time.perf_counter() - start

    wanted = case
    step(Case(case.method, 1, 16, 64))  # what the first product of a process loads is not the step's
    given = setting(case, torch.device("cpu"))
    before = _resident("VmRSS")
    step(case)
    peak = _resident("VmHWM") - before
    if keep:
        keep_freed_memory()
        step(case)
    seconds: list[float] = []
    while len(seconds) < 5 and sum(seconds) < 5:
        seconds.append(step(case))
    tokens = int(trained_rows(given[1].loss_mask, None, 1).sum())
    speed = tokens / sorted(seconds)[len(seconds) // 2]
    return {"peak_gb": peak / 1e9, "tokens_per_second": speed, "kept_freed_memory": keep}


def _resident(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return 1024 * int(line.split()[1])


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and their largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def estimate(case: Case) -> float:
    """GB (10^9 bytes) of the tensors alive at the peak of a dense step, without running it.

    The alignment loss, whose tensors are small, is left out: which rows it compares is not known beforehand.
    """
    drafter, batch, head_weight = setting(case, torch.device("meta"))
    with _Alive() as alive:
        dense_loss(
            drafter, load_recipe("coral", ["alignment.kind=none"]), batch, head_weight, torch.Generator()
        ).backward()
    return alive.peak / 1e9


def run(case: Case, limit_gb: float) -> dict[str, Any]:
    """Measure a case in its own process; a dense one that is estimated above the limit is not run."""
    row: dict[str, Any] = asdict(case)
    if case.method == "dense":
        row["estimated_gb"] = estimate(case)
        if row["estimated_gb"] > limit_gb:
            return row
    keep = 1.8 * row.get("estimated_gb", 0) < limit_gb
    command = [sys.executable, __file__, "--case", json.dumps([asdict(case), keep])]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        return {**row, "failed": ended.returncode}
    return {**row, **json.loads(ended.stdout.splitlines()[-1])}


def markdown(results: dict[str, Any]) -> str:
    """A table with a line for each shape."""
    where, rows = results["environment"], results["rows"]
    shapes = list(dict.fromkeys((row["batch"], row["length"], row["vocab"]) for row in rows))
    found = {(row["method"], row["batch"], row["length"], row["vocab"]): row for row in rows}
    lines = [
        f"One training step (forward and backward) of the recipe `coral`, {results['steps']} draft steps, "
        f"hidden size {results['hidden_size']}, float32, random features, every token trained. "
        f"{where['hardware']}, {where['threads']} threads, torch {where['torch']}. GB are 10^9 bytes.",
        "",
        "| B | L | V | "
        + " | ".join(f"memory {x}" for x in METHODS.values())
        + " | "
        + " | ".join(f"tokens/s {x}" for x in METHODS.values())
        + " |",
        "|" + "---:|" * (3 + 2 * len(METHODS)),
    ]
    for shape in shapes:
        given = [found.get((method, *shape), {}) for method in METHODS]
        cells = [f"{size:,}" for size in shape] + [_memory(row) for row in given]
        cells += [f"{row['tokens_per_second']:,.0f}" if "peak_gb" in row else "-" for row in given]
        lines.append(f"| {' | '.join(cells)} |")
    end = reproduce(results)
    return "\n".join([*lines, "", end, ""])


def _memory(row: dict[str, Any]) -> str:
    if "peak_gb" in row:
        return f"{row['peak_gb']:.2f} GB"
    if "failed" in row:
        return f"ended with {row['failed']}"
    return f"does not fit (estimated {row['estimated_gb']:.0f} GB)" if row else "-"


def plot(results: dict[str, Any], path: Path) -> None:
    """Memory and speed against L and V; hollow points are estimates of cases that do not fit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    single = [row for row in results["rows"] if row["batch"] == 1]
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex="col")
    for column, (axis, fixed) in enumerate((("length", "vocab"), ("vocab", "length"))):
        shared = max((row[fixed] for row in single), key=[row[fixed] for row in single].count)
        for index, (method, name) in enumerate(METHODS.items()):
            rows = [row for row in single if row["method"] == method and row[fixed] == shared]
            rows = sorted((row for row in rows if "failed" not in row), key=lambda row: row[axis])
            ran = [row for row in rows if "peak_gb" in row]
            if len(rows) < 2:
                continue
            style = {"color": f"C{index}", "marker": "o"}
            for panel, key in zip(panels[:, column], ("peak_gb", "tokens_per_second"), strict=True):
                panel.plot(
                    [r[axis] for r in ran], [r[key] for r in ran], label=name.replace("`", ""), **style
                )
            rest = [row for row in rows if "peak_gb" not in row]
            panels[0, column].plot(
                [row[axis] for row in rest], [row["estimated_gb"] for row in rest],
                linestyle="none", markerfacecolor="none", **style,
            )  # fmt: skip
        panels[0, column].set(yscale="log", ylabel="memory of a step, GB")
        panels[1, column].set(ylim=(0, None), ylabel="trained tokens/s")
        for panel in panels[:, column]:
            panel.set(xscale="log", xlabel={"length": "rows L", "vocab": "vocabulary V"}[axis])
            panel.set_title(f"one sequence, {'V' if fixed == 'vocab' else 'L'} = {shared:,}")
            panel.set_xticks(sorted({row[axis] for row in single if row[fixed] == shared}))
            panel.xaxis.set_major_formatter("{x:,.0f}")
            panel.tick_params(axis="x", rotation=45)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    panels[0, 0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="Directory for results.json, results.md and results.png.")
    parser.add_argument("--limit-gb", type=float, default=18.0, help="Run no case estimated above this.")
    parser.add_argument("--shrink", type=int, default=1, help="Divide L and V by this, to try the command.")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case, keep = json.loads(options.case)
        print(json.dumps(measure(Case(**case), keep)))
        return
    if options.output is None:
        parser.error("give --output, a directory for the results.")
    check()
    rows = []
    for case in cases(options.shrink):
        rows.append(run(case, options.limit_gb))
        print(json.dumps(rows[-1]), flush=True)
    config = load_recipe("coral")
    results = {
        **header(),
        "steps": config.steps,
        "hidden_size": setting(Case("ours", 1, 2, 2), torch.device("meta"))[0].config.hidden_size,
        "rows": rows,
    }
    save(options.output, results, markdown(results))
    plot(results, options.output / "results.png")


if __name__ == "__main__":
    main()
