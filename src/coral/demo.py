"""`coral demo`: the shipped pair on six prompts, plain against CORAL, with the draft tokens marked."""

from __future__ import annotations

from time import perf_counter

from rich.console import Console
from rich.table import Table
from rich.text import Text

from coral.api import EMBEDDED, Pair, load
from coral.bench.deepen import deepen as deepen_
from coral.chat import stream
from coral.decoding.generate import acceptance_length
from coral.decoding.proposers.plain import Plain
from coral.decoding.state import Cycle
from coral.decoding.tree import Budget
from coral.target import Target

PROMPTS = (
    ("chat", "What is the capital of France?"),
    ("chat", "How do I make a good cup of tea?"),
    ("maths", "Tom has 12 apples. He gives 5 to Ann and buys 8 more. How many apples does he have now?"),
    ("maths", "A train travels 60 miles per hour for 3 hours. How far does it go?"),
    ("code", "Write a Python function that returns the sum of a list of numbers."),
    ("code", "Write a Python function that checks whether a number is even."),
)


def run(deepen: int, max_new_tokens: int, dtype: str, budget: Budget | None) -> None:
    """Print six marked answers, then one table; the same prompts and tokens on both sides of every ratio."""
    console = Console(highlight=False, soft_wrap=True)
    console.print("Measuring the shipped pair as it is ...", style="dim")
    drafting = load(dtype=dtype, budget=budget, fallback=False)  # tau must not depend on the clock
    shallow = _measure(drafting, max_new_tokens)
    rows = [("as shipped", shallow)]
    if deepen:
        deepen_(drafting.target.model, deepen)
        deepened_target = Target(drafting.target.model, drafting.tokenizer, name=drafting.target.name)
        drafting = load(deepened_target, EMBEDDED / "drafter", budget=budget, fallback=False)
        console.print(
            f"The target is deepened to {deepen} layers by layers that change no output, so that it costs as "
            "much, beside its drafter, as an 8B model does.",
            style="dim",
        )
    console.print(
        Text.assemble("Green underlined", style="green underline"),
        Text("text (in brackets without colour) was drafted and accepted.\n"),
    )
    deepened = _measure(drafting, max_new_tokens, console)
    if deepen:
        rows.insert(0, (f"{deepen} layers", deepened))
    console.print(_table(rows))


def _measure(
    pair: Pair, max_new_tokens: int, console: Console | None = None
) -> tuple[float, float, list[Cycle], bool]:
    """Plain and accelerated seconds, the accelerated cycles, and whether all tokens are equal."""
    plain_pair = Pair(pair.target, Plain(), pair.budget)
    seconds, cycles, identical = [0.0, 0.0], [], True
    for warm in (plain_pair, pair):
        list(warm.generate(PROMPTS[0][1], max_new_tokens=4))
    for kind, prompt in PROMPTS:
        texts = []
        for i, side in enumerate((plain_pair, pair)):
            begin = perf_counter()
            state = side.start(prompt, max_new_tokens=max_new_tokens)
            if console is not None and side is pair:
                console.print(f"[bold]{kind}[/bold] [dim]{prompt}[/dim]")
                _, made = stream(side, side.cycles(state), (), True, console)
                console.print()
            else:
                made = list(side.cycles(state))
            seconds[i] += perf_counter() - begin
            texts.append(state.written)
            cycles += made if side is pair else []
        identical &= texts[0] == texts[1]
    return seconds[0], seconds[1], cycles, identical


def _table(rows: list[tuple[str, tuple[float, float, list[Cycle], bool]]]) -> Table:
    table = Table(title="Six prompts, greedy, the same tokens on both sides")
    for column in ("", "plain tokens/s", "CORAL tokens/s", "speedup ratio", "tau", "identical output"):
        table.add_column(column, justify="left" if not column else "right")
    for name, (plain, fast, cycles, identical) in rows:
        tokens = sum(len(cycle.tokens) for cycle in cycles)
        table.add_row(
            name,
            f"{tokens / plain:.1f}",
            f"{tokens / fast:.1f}",
            f"{plain / fast:.2f}x",
            f"{acceptance_length(cycles):.2f}",
            "yes" if identical else "NO",
        )
    return table
