"""Where the time of a cycle goes: `python benchmarks/cycle.py OUTPUT`.

The shipped pair, deepened to 32 layers, compiled, float32. Verification and a draft step are timed bare, and
then every part of real cycles of the same text; the ratio of a cycle to verification + S draft steps says
what everything else costs. Beside them stands the floor: bytes of weights over the bandwidth with which this
machine sums a large tensor. Writes OUTPUT/results.json and OUTPUT/results.md. Five minutes, most of them
compiling, on a quiet machine.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch
from publish import header, reproduce, save

from coral.api import EMBEDDED, Pair, make_proposer
from coral.bench.costs import verify_seconds
from coral.bench.deepen import deepen, plain_bytes
from coral.decoding.generate import acceptance_length
from coral.decoding.proposers.feature import Feature
from coral.decoding.proposers.plain import Plain
from coral.decoding.sampling import Sampling
from coral.decoding.state import Cycle
from coral.decoding.tree import DEFAULT
from coral.demo import PROMPTS
from coral.drafter.drafter import num_bytes
from coral.memory import keep_freed_memory
from coral.options import quiet_transformers, read_budget
from coral.target import Target

# What is timed inside a cycle: owner and name of the function, and what the table calls it.
PARTS: dict[tuple[str, str], str] = {
    ("proposer", "propose"): "propose",
    ("proposer", "_forward"): "draft steps",
    ("head", "topk"): "heads",
    ("target", "verify"): "verify",
    ("sampling", "sample"): "sample",
    ("target", "keep"): "keep",
}


def bandwidth(megabytes: int = 400, repeats: int = 9) -> float:
    """Bytes a second of summing a tensor that no cache holds."""
    data = torch.ones(megabytes << 18)
    times = []
    for _ in range(repeats):
        begin = perf_counter()
        data.sum()
        times.append(perf_counter() - begin)
    return 4 * data.numel() / min(times)


def watched(owner: Any, name: str, times: list[float]) -> Callable[..., Any]:
    """Replace a function by one that notes how long it took; returns the original."""
    original = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = perf_counter()
        result = original(*args, **kwargs)
        times.append(perf_counter() - begin)
        return result

    setattr(owner, name, timed)
    return original


def write(pair: Pair, tokens: int, temperature: float) -> list[Cycle]:
    cycles = []
    for _, prompt in PROMPTS:
        state = pair.start(prompt, max_new_tokens=tokens, temperature=temperature, ignore_eos=True)
        cycles += list(pair.cycles(state))
    return cycles


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96, help="of each of six texts")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--drafter", default=f"{EMBEDDED / 'drafter'}+static")
    parser.add_argument("--tree", default=None)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    options = parser.parse_args()
    keep_freed_memory()
    quiet_transformers()
    budget = read_budget(options.tree) or DEFAULT
    rows = budget.num_nodes + 1
    loaded = Target.load(EMBEDDED / "target", dtype="float32")
    if options.layers > loaded.config.num_hidden_layers:
        deepen(loaded.model, options.layers)
    target = loaded if options.eager else loaded.compiled((1, rows))
    proposer: Any = make_proposer(target, options.drafter)
    assert isinstance(proposer, Feature)
    begin = perf_counter()
    prompt = Pair(target, Plain(), budget).encode(PROMPTS[1][1])
    bare = verify_seconds(target, (1, rows), prompt)
    pair = Pair(target, proposer, budget)
    write(pair, 8, options.temperature)
    start = perf_counter() - begin

    plain_cycles = write(Pair(target, Plain(), budget), options.tokens // 4, options.temperature)
    plain = median(cycle.seconds for cycle in plain_cycles)
    owners = {"proposer": proposer, "head": proposer.head, "target": target, "sampling": Sampling}
    times: dict[str, list[float]] = defaultdict(list)
    originals = [
        (owners[o], name, watched(owners[o], name, times[part])) for (o, name), part in PARTS.items()
    ]
    cycles = write(pair, options.tokens, options.temperature)
    for owner, name, original in originals:
        setattr(owner, name, original)

    count = len(cycles)
    tau, steps = acceptance_length(cycles), fmean(cycle.num_forwards for cycle in cycles)
    cycle_seconds = sum(cycle.seconds for cycle in cycles) / count
    spent = {part: sum(times[part]) / count for part in PARTS.values()}
    parts = ("draft steps",) if proposer.head.compilable else ("draft steps", "heads")
    step = sum(median(times[part]) for part in parts)
    ideal = bare[rows] + steps * step
    speed, sizes = (
        bandwidth(),
        (plain_bytes(target.model), num_bytes(proposer.drafter) + proposer.head.num_bytes),
    )
    floor = (sizes[0] + steps * sizes[1]) / speed
    other = cycle_seconds - spent["propose"] - spent["verify"] - spent["sample"] - spent["keep"]
    table = {
        "verification (target forward, masks and padding)": spent["verify"],
        "draft steps (drafter, and a static head)": spent["draft steps"],
        "draft steps (any other head)": spent["heads"],
        "the rest of propose (growing, reading, pruning the tree)": spent["propose"]
        - spent["draft steps"]
        - spent["heads"],
        "sampling": spent["sample"],
        "keep (compacting the cache)": spent["keep"],
        "walk and bookkeeping": other,
    }
    results = {
        **header(),
        "start_seconds": start,
        "plain_seconds": plain,
        "verify_seconds": bare,
        "draft_step_seconds": step,
        "cycle_seconds": cycle_seconds,
        "parts": table,
        "tau": tau,
        "draft_steps": steps,
        "cycle_over_ideal": cycle_seconds / ideal,
        "speedup": tau * plain / cycle_seconds,
        "speedup_over_tau": plain / cycle_seconds,
        "bandwidth": speed,
        "plain_bytes": sizes[0],
        "step_bytes": sizes[1],
        "floor_seconds": floor,
    }
    lines = [
        f"{count} cycles of six texts, tau {tau:.2f}, {steps:.2f} draft steps a cycle, tree {budget}.",
        "",
        "| part of a cycle | ms | share |",
        "|---|---|---|",
        *(f"| {part} | {milliseconds(s)} | {s / cycle_seconds:.0%} |" for part, s in table.items()),
        f"| **cycle** | {milliseconds(cycle_seconds)} | 100% |",
        "",
        f"- bare: verification of {rows} rows {milliseconds(bare[rows])} ms, of one row "
        f"{milliseconds(bare[1])} ms, a draft step {milliseconds(step)} ms; a plain step with sampling "
        f"{milliseconds(plain)} ms",
        f"- cycle / (verification + {steps:.2f} draft steps): {cycle_seconds / ideal:.2f}",
        f"- a cycle costs {cycle_seconds / plain:.2f} plain steps, so speedup / tau without prefill is "
        f"{plain / cycle_seconds:.2f}, the speedup {tau * plain / cycle_seconds:.2f}x",
        f"- floor: {sizes[0] / 2**20:.0f} MiB of weights a forward, {sizes[1] / 2**20:.0f} a draft step, at "
        f"{speed / 1e9:.1f} GB/s: a plain step {milliseconds(sizes[0] / speed)} ms, a cycle "
        f"{milliseconds(floor)} ms",
        f"- {start:.0f} s from the loaded target to the end of a warm-up"
        + ("" if options.eager else ", compiling included"),
        "",
        reproduce(results),
        "",
    ]
    save(options.output, results, "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
