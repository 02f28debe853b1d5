"""What a person sees of generation in a terminal: streamed text, marked draft tokens, a conversation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from coral import notes
from coral.api import Pair
from coral.decoding.generate import acceptance_length
from coral.decoding.state import Cycle
from coral.decoding.text import Detokenizer, Stop, cut_at, stop_strings
from coral.errors import CoralError

_DRAFTED = Style(color="green", underline=True)


def answer(pair: Pair, prompt: str, options: dict[str, Any], *, stats: bool, mark: bool) -> None:
    """Stream one answer to standard output; statistics go to standard error."""
    _note([*notes.of_model(pair, options), *notes.of_prompt(pair, prompt, options["chat"])])
    begin = perf_counter()
    state = pair.start(prompt, **options)
    _, cycles = stream(pair, pair.cycles(state), options["stop"], mark)
    if stats:
        print_stats(pair, cycles, perf_counter() - begin)


def converse(pair: Pair, options: dict[str, Any], *, stats: bool, mark: bool) -> None:
    """A conversation until Ctrl-D: each turn reads only what is new, the rest is still in the KV cache."""
    pair.encode([{"role": "user", "content": "?"}])  # without a chat template, say so now
    _note(notes.of_model(pair, options))
    console = Console(highlight=False)
    console.print("Write a message; /new starts over, Ctrl-D ends.", style="dim")
    messages: list[dict[str, str]] = []
    state = None
    while True:
        try:
            question = console.input("[bold]> [/bold]").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print()  # the terminal shows ^C behind the prompt
            raise
        if question == "/new":
            messages, state = [], None
        if not question or question == "/new":
            continue
        asked = [*messages, {"role": "user", "content": question}]
        begin = perf_counter()
        try:
            if state is None:
                state = pair.start(asked, **options)
            else:
                pair.go_on(state, asked, max_new_tokens=options["max_new_tokens"])
        except CoralError as error:  # too long for the context, for example: the conversation is not lost
            console.print(f"{error} /new starts over.", style="yellow")
            continue
        text, cycles = stream(pair, pair.cycles(state), options["stop"], mark)
        messages = [*asked, {"role": "assistant", "content": text}]
        if stats:
            print_stats(pair, cycles, perf_counter() - begin)


def stream(
    pair: Pair, cycles: Iterator[Cycle], stop: Stop, mark: bool, console: Console | None = None
) -> tuple[str, list[Cycle]]:
    """Print text as it comes; returns it with its cycles. With `mark`, accepted draft tokens are marked."""
    console = console or Console(highlight=False, soft_wrap=True)
    detokenizer, stop = Detokenizer(pair.tokenizer), stop_strings(stop)
    text, shown, done = "", 0, []
    try:
        for cycle in cycles:
            done.append(cycle)
            accepted = cycle.num_accepted
            for tokens, drafted in ((cycle.tokens[:accepted], True), (cycle.tokens[accepted:], False)):
                text += "".join(map(detokenizer.push, tokens))
                end = _safe_end(text, stop)
                _show(console, text[shown:end], marked=drafted and mark)
                shown = max(shown, end)
        text = cut_at(text + detokenizer.rest(), stop)
        _show(console, text[shown:], marked=False)
    finally:  # what comes next, be it the message after Ctrl-C, begins on a line of its own
        console.print()
    return text, done


def _safe_end(text: str, stop: Sequence[str]) -> int:
    """Up to where `text` may be shown: not into a stop string, nor into what may become one."""
    if any(s in text for s in stop):
        return len(cut_at(text, stop))
    starts = (n for s in stop for n in range(min(len(s) - 1, len(text)), 0, -1) if text.endswith(s[:n]))
    return len(text) - max(starts, default=0)


def _show(console: Console, piece: str, *, marked: bool) -> None:
    """As a segment: as text, rich would turn tabs into spaces and drop control characters."""
    if not piece:
        return
    if marked and console.color_system is None:
        piece = f"[{piece}]"
    console.print(Segments([Segment(piece, _DRAFTED if marked else None)]), end="")


def _note(lines: Iterable[str]) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    for line in lines:
        console.print(line, style="dim")


def print_stats(pair: Pair, cycles: Iterable[Cycle], seconds: float) -> None:
    """One line on standard error: tokens, speed, acceptance length, where the time went, and the tree."""
    cycles = list(cycles)
    tokens = sum(len(cycle.tokens) for cycle in cycles)
    drafted, accepted = sum(c.num_drafted for c in cycles), sum(c.num_accepted for c in cycles)
    plain = sum(cycle.num_drafted == 0 for cycle in cycles)
    shares = [sum(getattr(c, name) for c in cycles) / seconds for name in ("draft_seconds", "verify_seconds")]
    waited = seconds - sum(cycle.seconds for cycle in cycles[1:])
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:.1f} tokens/s), "
        f"the first after {waited:.2f} s, {len(cycles)} cycles ({plain} of them plain steps), "
        f"tau {acceptance_length(cycles):.2f}, {accepted} of {drafted} draft tokens accepted, "
        f"drafting {shares[0]:.0%}, verification {shares[1]:.0%} of the time, "
        f"tree {pair.budget} ({pair.budget_origin})",
        style="dim",
    )
