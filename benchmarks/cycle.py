"""Where the time of a cycle goes: `python benchmarks/cycle.py OUTPUT`.

The shipped pair, deepened to 32 layers; texts end where the target ends them. Plain steps, bare
verifications and every part of real cycles are timed in turn, text after text, since a shared machine
changes its speed from minute to minute; the ratio of a cycle to verification + S draft steps says what
everything else costs. Bare verifications are of the rows that the cycles had, timed in the middle of each
text. A text's first cycle, in which the drafter reads the prompt, is left out. Times are means without the
stalls, those above three times the median. Beside them stands the floor: bytes of weights, as bfloat16,
over the bandwidth with which this machine sums a large tensor. Writes OUTPUT/results.json and
OUTPUT/results.md. Half a minute, on a quiet machine.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch
from publish import header, show

from coral.api import LLM
from coral.bench.costs import verify_seconds
from coral.bench.deepen import deepen, plain_bytes
from coral.cli.demo import PROMPTS
from coral.cli.options import quiet_transformers, read_tree_size
from coral.decoding.cycle import acceptance_length
from coral.decoding.merged import Merged
from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.decoding.state import Cycle, State
from coral.drafters.drafting import Drafting
from coral.drafters.feature.propose import Feature
from coral.native.memory import keep_freed_memory
from coral.suites import prompts as suites
from coral.target.default import TOY
from coral.target.target import Target
from coral.tree import CPU_DEFAULT

# What is timed inside a cycle: owner and name of the function, and what the table calls it.
PARTS: dict[tuple[str, str], str] = {
    ("proposer", "propose"): "propose",
    ("lookup", "propose"): "lookup",
    ("native", "grow"): "draft steps",
    ("target", "verify"): "verify",
    ("sampling", "sample"): "sample",
    ("state", "keep"): "keep",
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


def run(pair: LLM, prompt: str | list[int], tokens: int, temperature: float) -> Iterator[Cycle]:
    state = pair.start(prompt, max_new_tokens=tokens, temperature=temperature)
    return iter(pair.cycles(state))


def steady(seconds: list[float]) -> float:
    """The mean without stalls of the machine."""
    most = 3 * median(seconds)
    return fmean(s for s in seconds if s <= most)


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument(
        "--suites", help="as `coral bench` names them, instead of the six prompts of the demo"
    )
    parser.add_argument("--limit", type=int, default=4, help="prompts of each suite")
    parser.add_argument("--tokens", type=int, default=128, help="at most, of each text a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--drafter", default=f"{TOY / 'drafter'}+static")
    parser.add_argument("--tree", default=None)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    keep_freed_memory()
    quiet_transformers()
    tree_size = read_tree_size(options.tree) or CPU_DEFAULT
    rows = tree_size.num_nodes + 1
    loaded = Target.load(TOY / "target", dtype=options.dtype)
    if options.layers > loaded.config.num_hidden_layers:
        deepen(loaded.model, options.layers)
    target = loaded.on("native")
    proposer: Any = Drafting.parse(options.drafter, fallback=False).proposer(target)
    drafter = proposer.drafter if isinstance(proposer, Merged) else proposer
    assert isinstance(drafter, Feature) and drafter._native, "this drafter is not drafted with natively"
    pair, plain = LLM(target, proposer, tree_size), LLM(target, Plain(), tree_size)
    begin = perf_counter()
    for warm in (pair, plain):
        list(run(warm, PROMPTS[0][1], 8, options.temperature))
    start = perf_counter() - begin

    prompts: list[str | list[int]] = [prompt for _, prompt in PROMPTS]
    if options.suites:
        loaded_suites = suites.load(options.suites, options.limit).values()
        prompts = [suites.render(target.tokenizer, prompt) for suite in loaded_suites for prompt in suite]
    native = drafter._native
    owners = {"proposer": proposer, "native": native, "target": target, "state": State, "sampling": Sampling}
    if proposer is not drafter:
        owners["lookup"] = proposer.lookup
    watching = {key: part for key, part in PARTS.items() if key[0] in owners}
    times: dict[str, list[float]] = defaultdict(list)
    bare: dict[int, list[float]] = defaultdict(list)
    plain_steps: list[float] = []
    cycles: list[Cycle] = []
    for prompt in prompts * options.rounds:
        half = list(run(plain, prompt, options.tokens // 2, options.temperature))
        plain_steps += [cycle.seconds for cycle in half]
        prefix = plain.encode(prompt) + [token for cycle in half for token in cycle.tokens]
        for _ in range(4):
            for size, seconds in verify_seconds(target, range(1, rows + 1), prefix, repeats=1).items():
                bare[size].append(seconds)
        running = run(pair, prompt, options.tokens, options.temperature)
        next(running)  # here the drafter reads the prompt
        originals = [
            (owners[o], name, watched(owners[o], name, times[part])) for (o, name), part in watching.items()
        ]
        cycles += running
        for owner, name, original in originals:
            setattr(owner, name, original)

    count, plain_step = len(cycles), steady(plain_steps)
    verified = fmean(steady(bare[cycle.num_drafted + 1]) for cycle in cycles)
    mean_rows = 1 + fmean(cycle.num_drafted for cycle in cycles)
    tau, steps = acceptance_length(cycles), fmean(cycle.num_forwards for cycle in cycles)
    cycle_seconds = steady([cycle.seconds for cycle in cycles])
    spent = {part: steady(times[part]) * len(times[part]) / count for part in watching.values()}
    step = spent["draft steps"] / steps
    ideal = verified + steps * step
    speed, table = bandwidth(), drafter.head.table(None)
    assert table is not None
    sizes = 2 * plain_bytes(target.model) // target.dtype.itemsize, native.num_bytes(table)
    floor = (sizes[0] + steps * sizes[1]) / speed
    other = cycle_seconds - spent["propose"] - spent["verify"] - spent["sample"] - spent["keep"]
    parts = {
        "verification (target forward, masks and padding)": spent["verify"],
        "draft steps (drafter, head, the choice of nodes)": spent["draft steps"],
        **({"lookup": spent["lookup"]} if "lookup" in spent else {}),
        "the rest of propose": spent["propose"] - spent["draft steps"] - spent.get("lookup", 0),
        "sampling": spent["sample"],
        "keep (compacting the cache)": spent["keep"],
        "walk and bookkeeping": other,
    }
    results = {
        **header(),
        "start_seconds": start,
        "plain_seconds": plain_step,
        "verify_seconds": {n: steady(seconds) for n, seconds in bare.items()},
        "bare_verification_seconds": verified,
        "rows": mean_rows,
        "draft_step_seconds": step,
        "cycle_seconds": cycle_seconds,
        "parts": parts,
        "tau": tau,
        "draft_steps": steps,
        "cycle_over_ideal": cycle_seconds / ideal,
        "speedup": tau * plain_step / cycle_seconds,
        "speedup_over_tau": plain_step / cycle_seconds,
        "bandwidth": speed,
        "plain_bytes": sizes[0],
        "step_bytes": sizes[1],
        "floor_seconds": floor,
    }
    lines = [
        f"{options.dtype}, {count} cycles of {len(prompts)} texts, tau {tau:.2f}, {steps:.2f} draft steps a "
        f"cycle, tree {tree_size}.",
        "",
        "| part of a cycle | ms | share |",
        "|---|---|---|",
        *(f"| {part} | {milliseconds(s)} | {s / cycle_seconds:.0%} |" for part, s in parts.items()),
        f"| **cycle** | {milliseconds(cycle_seconds)} | 100% |",
        "",
        f"- bare: verification of {mean_rows:.1f} rows in the mean {milliseconds(verified)} ms, of one row "
        f"{milliseconds(steady(bare[1]))} ms, a draft step {milliseconds(step)} ms; a plain step with "
        f"sampling {milliseconds(plain_step)} ms",
        f"- cycle / (verification + {steps:.2f} draft steps): {cycle_seconds / ideal:.2f}",
        f"- a cycle costs {cycle_seconds / plain_step:.2f} plain steps, so speedup / tau without prefill is "
        f"{plain_step / cycle_seconds:.2f}, the speedup {tau * plain_step / cycle_seconds:.2f}x",
        f"- floor: {sizes[0] / 2**20:.0f} MiB of weights a forward, {sizes[1] / 2**20:.0f} a draft step, at "
        f"{speed / 1e9:.1f} GB/s: a plain step {milliseconds(sizes[0] / speed)} ms, a cycle "
        f"{milliseconds(floor)} ms",
        f"- {start:.0f} s from the loaded target to the end of a warm-up, compiling included",
    ]
    show(options.output, results, lines)


if __name__ == "__main__":
    main()
