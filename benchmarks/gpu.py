"""What decoding costs on this device at the sizes of two LLMs: `python benchmarks/gpu.py OUTPUT`.

Times a plain step, verification, and the draft step with four heads, on random weights: time does not depend
on what they are. Two ways: `eager`, each forward as the package runs it, and `prepared`, the same layers with
all inputs on the device and, on CUDA, replayed from a CUDA graph: what is left once the host is out of the
way. From these follows speedup / tau = 1 / (v + S c) of a tree, and with `--tau RESULTS.json`, the results of
a `coral bench`, the speedup that its drafters would have at these sizes. Beside them stands what whole cycles
take, as `--backend graphs` decodes. Writes OUTPUT/results.json and OUTPUT/results.md. `--shape tiny
--device cpu` tries it out in seconds.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import psutil
import torch
from publish import header, reproduce, save
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from coral.bench.costs import Costs, verify_seconds
from coral.bench.deepen import plain_bytes
from coral.cache import KVCache
from coral.decoding.cycle import Proposer, generate
from coral.decoding.plain import Plain
from coral.decoding.state import State
from coral.drafters.feature.network import Drafter, DrafterConfig
from coral.drafters.feature.propose import Feature
from coral.drafters.heads.full import FullHead
from coral.drafters.heads.groups import contiguous
from coral.drafters.heads.routed import RoutedHead, Router
from coral.drafters.heads.static import StaticHead
from coral.drafters.heads.store import Head
from coral.drafters.kinds import num_bytes
from coral.gpu.graphs import record
from coral.target.forward import their_cache
from coral.target.grouped_sdpa import GROUPED_SDPA
from coral.target.target import Target
from coral.tree import DEFAULT, TreeSize

SHAPES: dict[str, PreTrainedConfig] = {
    "llama-3-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
    ),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32768,
    ),
    "tiny": LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    ),
}  # fmt: skip
ROWS = (1, 8, 16, 32, 64)  # of a verification; 1 is a plain step
WIDTHS = (1, 4, 8)  # nodes of a level
TREES = ((16, 4), (16, 6), (32, 6), (64, 8))  # rows verified and draft steps, where no tau is given
WARM_UPS = 3  # cycles, in which forwards are compiled and recorded
CALLS = 10  # between two looks at the clock


def build(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> Target:
    """A target of random weights, made on the device."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=GROUPED_SDPA)
    return Target(model)


def heads_of(target: Target) -> Iterator[tuple[str, Head]]:
    """The heads by name, one at a time: they copy their rows of the LM head."""
    size = target.vocab_size
    yield "full", FullHead(target)
    yield "static", StaticHead(target, torch.arange(min(32768, size // 4)))
    yield "routed", RoutedHead(target, Router(target.hidden_size, 16), contiguous(size, 16), 4)
    # What an in-context head multiplies: the rows of the few ids that the text and its drafts hold.
    yield "in_context", StaticHead(target, torch.arange(min(3072, size // 8)))


def verification(target: Target, rows: int, context: int) -> Callable[[], Any]:
    """A forward over a chain of `rows` nodes behind `context` rows, with its inputs on the device."""
    device, cache = target.device, target.new_cache(context + rows)
    ids = torch.randint(target.vocab_size, (1, context + rows), device=device)
    positions = torch.arange(context + rows, device=device)[None]
    chain = positions[0] <= positions[0, context:, None]
    mask = None if rows == 1 else chain[None, None]

    def forward() -> torch.Tensor:
        features = target.decoder(
            input_ids=ids[:, context:],
            position_ids=positions[:, context:],
            attention_mask=mask,
            past_key_values=their_cache(cache.layers),
            use_cache=True,
        ).last_hidden_state
        cache.keep(context)
        return target.head(features[0])

    target.decoder(
        input_ids=ids[:, :context],
        position_ids=positions[:, :context],
        past_key_values=their_cache(cache.layers),
        use_cache=True,
    )
    return forward


def draft_step(
    target: Target, drafter: Drafter, head: Head, width: int, context: int
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The draft step of a level of `width` nodes behind `context` rows, and its head alone."""
    device = target.device
    cache = KVCache(len(drafter.layers), context + width)
    ids = torch.randint(target.vocab_size, (context + width,), device=device)
    features = torch.randn(context + width, target.hidden_size, device=device, dtype=target.dtype)
    before = torch.arange(context, device=device)
    drafter(target.embed(ids[before])[None], features[None, before], before[None], cache.layers)
    ids, features = ids[context:], features[context:]
    positions = torch.full((1, width), context, device=device)
    mask = torch.ones(width, context + width, dtype=torch.bool, device=device)
    mask[:, context:] = torch.eye(width, dtype=torch.bool, device=device)
    scores = torch.full((width,), -1.0, device=device)

    def score(rows: torch.Tensor = features) -> Any:
        return head.topk(rows, DEFAULT.top_k, [], scores)

    def step() -> Any:
        output = drafter(target.embed(ids)[None], features[None], positions, cache.layers, mask)
        cache.keep(context)
        return score(drafter.feedback(output)[0])

    return step, score


def prepared(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`run` as a CUDA graph; elsewhere as it is."""
    return record(run)[1] if device.type == "cuda" else run


def seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, several of them between two looks at the clock."""
    found = []
    for _ in range(repeats + 1):
        _wait(device)
        begin = perf_counter()
        for _ in range(CALLS):
            run()
        _wait(device)
        found.append((perf_counter() - begin) / CALLS)
    return median(found[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes a second that a copy reads and writes."""
    size = 2**30 if device.type == "cuda" else 2**26
    source, copy = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / seconds(lambda: copy.copy_(source), device, repeats)


@torch.inference_mode()
def measure(name: str, target: Target, context: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of results: what was run, how, its seconds and the bytes of weights it reads."""
    device, found = target.device, []
    with device:
        drafter = Drafter(DrafterConfig.for_target(target.config)).to(target.dtype).eval()
    dtype = str(target.dtype).removeprefix("torch.")

    def add(way: str, what: str, rows: int, taken: float, read: int, **more: Any) -> None:
        row = {"shape": name, "dtype": dtype, "way": way, "what": what, "rows": rows, "seconds": taken}
        found.append({**row, "bytes": read, **more})

    plain = plain_bytes(target.model)
    prefix = torch.randint(target.vocab_size, (context + 1,)).tolist()
    for rows, taken in verify_seconds(target, ROWS, prefix, repeats).items():
        add("eager", "verify", rows, taken, plain)
    for rows in ROWS:
        forward = prepared(verification(target, rows, context), device)
        add("prepared", "verify", rows, seconds(forward, device, repeats), plain)
    for head_name, head in heads_of(target):
        for width in WIDTHS:
            parts = draft_step(target, drafter, head, width, context)
            for way in ("eager", "prepared"):
                runs = parts if way == "eager" else [prepared(run, device) for run in parts]
                step, score = (seconds(run, device, repeats) for run in runs)
                read = num_bytes(drafter) + head.num_bytes
                add(way, "draft", width, step, read, head=head_name, head_seconds=score)
    return found


def cycles(name: str, target: Target, context: int, repeats: int) -> list[dict[str, Any]]:
    """Real cycles by tree and head, with plain steps first: median seconds; on CUDA compiled and replayed."""
    with target.device:
        drafter = Drafter(DrafterConfig.for_target(target.config)).to(target.dtype).eval()
    fast = target
    if target.device.type == "cuda":
        fast = target.on("graphs", [1, *(rows for rows, _ in TREES)])
    prefix = torch.randint(target.vocab_size, (context + 1,)).tolist()

    def timed(proposer: Proposer, tree_size: TreeSize) -> float:
        deepest = len(prefix) + (repeats + WARM_UPS) * (tree_size.max_depth + 1)
        state = State(list(prefix), deepest, fast.new_cache(deepest + tree_size.num_nodes))
        run = islice(generate(fast, proposer, [state], tree_size), WARM_UPS + repeats)
        return median([cycle.seconds for (cycle,) in run][WARM_UPS:])

    plain = timed(Plain(), TreeSize(1, 0, 1))
    found = [{"shape": name, "tree": "plain step", "head": "", "seconds": plain, "speedup_by_tau": 1.0}]
    for head_name, head in heads_of(target):
        for rows, steps in TREES:
            taken = timed(Feature(drafter, fast, head), TreeSize(WIDTHS[-1], steps, rows - 1))
            tree = f"{rows} rows, {steps} draft steps"
            row = {"shape": name, "tree": tree, "head": head_name, "seconds": taken}
            found.append({**row, "speedup_by_tau": plain / taken})
    return found


def project(rows: list[dict[str, Any]], trees: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """speedup / tau = 1 / (v + S c) of each tree with each head, c being that of the widest level."""
    found = []
    for shape, way in dict.fromkeys((row["shape"], row["way"]) for row in rows):
        mine = [row for row in rows if (row["shape"], row["way"]) == (shape, way)]
        timed = {row["rows"]: row["seconds"] for row in mine if row["what"] == "verify"}
        costs = Costs("", "", {}, timed[1], timed, {})
        steps = {
            row["head"]: row["seconds"] for row in mine if row.get("rows") == WIDTHS[-1] and "head" in row
        }
        for tree in trees:
            for head, step in steps.items():
                v, c = costs.v(tree["rows"]), step / timed[1]
                ratio = 1 / (v + tree["steps"] * c)
                tau = tree["tau"]
                speedup = None if tau is None else tau * ratio
                row = {**tree, "shape": shape, "way": way, "head": head, "v": v, "c": c}
                found.append({**row, "speedup_by_tau": ratio, "speedup": speedup})
    return found


def trees_of(results: Path | None) -> list[dict[str, Any]]:
    """The trees to project: those that the drafters of a bench grew over all suites, or some fixed ones."""
    if results is None:
        names = ((f"{rows} rows, {steps} draft steps", rows, steps) for rows, steps in TREES)
        return [{"tree": name, "tau": None, "rows": rows, "steps": steps} for name, rows, steps in names]
    return [
        {
            "tree": f"{row['drafter']}, T = {row['temperature']:g}, {row['dtype']}",
            "tau": row["tau"],
            "rows": row["nodes"],
            "steps": row["draft_forwards"],
        }
        for row in json.loads(results.read_text(encoding="utf-8"))["rows"]
        if row["kind"] == "drafter" and row["suite"] == "all" and row["tau"] is not None
    ]


def markdown(results: dict[str, Any]) -> str:
    """Two tables for each shape: what each forward costs, and what follows for the trees."""
    where, speed = results["environment"], results["bandwidth"]
    lines = [
        f"{where['hardware']}, torch {where['torch']}, random weights, behind {results['context']} rows, "
        f"batch 1. Floor: bytes of weights over {speed / 1e9:.0f} GB/s, what a copy reaches here. eager: as "
        "the package runs; prepared: inputs on the device, on CUDA replayed from a graph.",
        "",
    ]
    for shape in dict.fromkeys(row["shape"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["shape"] == shape]
        plain = {row["way"]: row["seconds"] for row in rows if (row["what"], row["rows"]) == ("verify", 1)}
        heading = ["forward", "rows", "floor, ms"]
        for way in plain:
            heading += [f"{way}, ms", "in plain steps", "head's share"]
        lines += [f"**{shape}, {rows[0]['dtype']}**", "", _line(heading), _line(["---"] * len(heading))]
        for what, head, count in dict.fromkeys((r["what"], r.get("head"), r["rows"]) for r in rows):
            same = [r for r in rows if (r["what"], r.get("head"), r["rows"]) == (what, head, count)]
            name = f"draft step, {head} head" if head else "plain step" if count == 1 else "verification"
            cells = [name, f"{count}", f"{1e3 * same[0]['bytes'] / speed:.3f}"]
            for row in same:
                share = f"{row['head_seconds'] / row['seconds']:.0%}" if head else ""
                taken = row["seconds"]
                cells += [f"{1e3 * taken:.3f}", f"{taken / plain[row['way']]:.3f}", share]
            lines.append(_line(cells))
        heading = ["tree", "way", "head", "tau", "rows", "S", "v", "c", "speedup / tau", "speedup"]
        lines += ["", _line(heading), _line(["---"] * len(heading))]
        for row in results["projected"]:
            if row["shape"] == shape:
                tau, speedup = (f"{x:.2f}" if x is not None else "" for x in (row["tau"], row["speedup"]))
                sizes = [f"{row['rows']:.1f}", f"{row['steps']:.2f}", f"{row['v']:.2f}", f"{row['c']:.3f}"]
                names = [row["tree"], row["way"], row["head"], tau]
                lines.append(_line([*names, *sizes, f"{row['speedup_by_tau']:.2f}", speedup]))
        lines += ["", "| cycle | head | ms | speedup / tau |", "|---|---|---|---|"]
        for row in results["cycles"]:
            if row["shape"] == shape:
                numbers = [f"{1e3 * row['seconds']:.3f}", f"{row['speedup_by_tau']:.2f}"]
                lines.append(_line([row["tree"], row["head"], *numbers]))
        lines.append("")
    return "\n".join(
        [
            *lines,
            f"Projected: speedup / tau = 1 / (v + S c) with c at {WIDTHS[-1]} nodes; the host's work between "
            "forwards is not in it, and a tau was measured with its method's own head. Cycles are measured "
            "whole, as `--backend graphs` decodes.",
            "",
            reproduce(results),
            "",
        ]
    )


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _fits(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is room for the target, and as much again by half for drafter, heads and work."""
    with torch.device("meta"):
        needed = 1.5 * num_bytes(AutoModelForCausalLM.from_config(config, dtype=dtype))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        print(f"left out: it needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free", file=sys.stderr)
    return needed <= free


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=["llama-3-8b", "qwen2.5-7b"])
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=512, help="rows in the caches")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tau", type=Path, help="results.json of a coral bench: its taus and trees")
    given = parser.parse_args()
    device, dtype = given.device, getattr(torch, given.dtype)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no GPU that torch can use; try --device cpu --shape tiny")
    results: dict[str, Any] = {
        **header(device),
        "context": given.context,
        "bandwidth": bandwidth(device, given.repeats),
        "rows": [],
        "cycles": [],
    }
    trees = trees_of(given.tau)
    for name in given.shape:
        if not _fits(SHAPES[name], device, dtype):
            continue
        target = build(SHAPES[name], device, dtype)
        for part, run in (("rows", measure), ("cycles", cycles)):
            results[part] += run(name, target, given.context, given.repeats)
        del target
        gc.collect()  # the target is part of a circle, and the next one may need its room
        torch.cuda.empty_cache()
        results["projected"] = project(results["rows"], trees)
        print(f"{name}: done", file=sys.stderr)
        save(given.output, results, markdown(results))
    if results["rows"]:
        print(markdown(results))


if __name__ == "__main__":
    main()
