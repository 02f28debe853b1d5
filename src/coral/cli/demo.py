"""`coral demo`: SmolLM2 on six prompts, with its draft tokens marked; then Hugging Face, plain and CORAL."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from coral.errors import CoralError
from coral.progress import spinner
from coral.target import default as models

if TYPE_CHECKING:
    from coral.api import LLM
    from coral.decoding.state import Cycle
    from coral.tree import TreeSize

PROMPTS = (
    ("chat", "What is the capital of France, and what is it known for?"),
    ("chat", "Give me three tips for staying healthy."),
    ("maths", "Tom has 12 apples. He gives 5 to Ann and buys 8 more. How many apples does he have now?"),
    ("maths", "A train travels 60 miles per hour for 3 hours. How far does it go?"),
    ("code", "Write a Python function that returns the sum of a list of numbers."),
    ("code", "Write a Python function that checks whether a string is a palindrome."),
)
HF_TOKENS = 24
"""Tokens of each prompt that Hugging Face's `generate` writes: some six prompts' worth of patience."""


@dataclass
class _Row:
    """One way of writing: its tokens, its seconds, and how many prompts got the plain text; its cycles."""

    tokens: int = 0
    seconds: float = 0.0
    equal: int = 0
    cycles: list[Cycle] = field(default_factory=list)

    def add(self, written: list[int], plain: list[int], seconds: float) -> None:
        self.tokens += len(written)
        self.seconds += seconds
        self.equal += written == plain[: len(written)]


def run(max_new_tokens: int, dtype: str, tree_size: TreeSize | None) -> None:
    """Print six marked answers, then one table.

    Raises:
        CoralError: SmolLM2 cannot be fetched, and this is no checkout, which has a toy to show instead.
    """
    console = Console(highlight=False, soft_wrap=True)
    with spinner("Loading SmolLM2"):
        source, drafter = None, models.DRAFTER
        try:
            models.fetch()
        except CoralError as error:
            if not models.TOY.is_dir():
                raise
            console.print(f"{error} Until then, a toy of 14M parameters:\n", style="yellow")
            source, drafter = models.TOY / "target", models.TOY / "drafter"
            dtype = "float32" if dtype == "auto" else dtype
        from coral.api import load
        from coral.cli.options import quiet_transformers

        quiet_transformers()
        pair = load(source, drafter, dtype=dtype, tree=tree_size)
    console.print(
        f"{pair.target.name} in {pair.target.precision}. ",
        Text.assemble("Green underlined", style="green underline"),
        Text(" text (in brackets without colour) was drafted and accepted.\n"),
        sep="",
    )
    console.print(_table(_write(pair, max_new_tokens, console), max_new_tokens))


def _write(pair: LLM, max_new_tokens: int, console: Console) -> dict[str, _Row]:
    """Every prompt three times; the pair's answers are streamed."""
    from coral.api import LLM
    from coral.bench.methods import hugging_face
    from coral.cli.chat import stream
    from coral.decoding.plain import Plain
    from coral.decoding.sampling import Sampling

    plain, generate = LLM(pair.target, Plain(), pair.tree_size), hugging_face(pair.target)
    rows = {name: _Row() for name in ("Hugging Face generate", "plain", "CORAL")}
    few = min(HF_TOKENS, max_new_tokens)
    with spinner("Warming up"):
        for warm in (plain, pair):
            list(warm.stream(PROMPTS[0][1], max_new_tokens=4))
        generate(pair.encode(PROMPTS[0][1]), Sampling(), 0, 2)
    for kind, prompt in PROMPTS:
        console.print(f"[bold]{kind}[/bold] [dim]{prompt}[/dim]")
        begin = perf_counter()
        state = pair.start(prompt, max_new_tokens=max_new_tokens)
        _, cycles = stream(pair, pair.cycles(state), (), True, console)
        seconds = perf_counter() - begin
        console.print()
        with spinner("The same by plain steps and by Hugging Face"):
            begin = perf_counter()
            alone = plain.start(prompt, max_new_tokens=max_new_tokens)
            list(plain.cycles(alone))
            rows["plain"].add(alone.written, alone.written, perf_counter() - begin)
            theirs = generate(pair.encode(prompt), Sampling(), 0, few, alone.eos_ids)
        rows["CORAL"].add(state.written, alone.written, seconds)
        rows["CORAL"].cycles += cycles
        rows["Hugging Face generate"].add(theirs.tokens, alone.written, theirs.seconds)
    return rows


def _table(rows: dict[str, _Row], max_new_tokens: int) -> Table:
    from coral.decoding.cycle import acceptance_length

    theirs, plain, ours = rows.values()
    table = Table(
        title="Six prompts, greedy; reading them included",
        caption=f"up to {max_new_tokens} tokens a prompt; Hugging Face, being slow, up to "
        f"{min(HF_TOKENS, max_new_tokens)}, and in bfloat16 it rounds otherwise, which near ties show",
    )
    for column in ("", "tokens", "tokens/s", "over plain", "tau", "identical"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        table.add_row(
            name,
            str(row.tokens),
            f"{row.tokens / row.seconds:.1f}",
            f"{row.tokens / row.seconds / (plain.tokens / plain.seconds):.2f}x",
            f"{acceptance_length(row.cycles):.2f}" if row is ours else "1.00",
            "yes"
            if row.equal == len(PROMPTS)
            else f"{row.equal} of {len(PROMPTS)}"
            if row is theirs
            else "NO",
        )
    return table
