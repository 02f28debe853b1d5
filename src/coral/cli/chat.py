"""What a person sees of generation in a terminal: streamed text, marked draft tokens, a conversation."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from coral.api import LLM
from coral.cli import notes
from coral.decoding.cycle import acceptance_length
from coral.decoding.plain import Plain
from coral.decoding.state import Cycle
from coral.decoding.text import Detokenizer, Stop, cut_at, stop_strings
from coral.errors import CoralError

_RESET = ("/reset", "/new", "/clear")
_LEAVE = ("/quit", "/exit", "/bye", "exit", "quit")
_HELP = "/reset starts over, /quit leaves (or Ctrl-D); anything else is a message."
_DRAFTED = Style(color="green", underline=True)


def answer(
    pair: LLM, prompt: str, options: dict[str, Any], *, loaded: float | None = None, mark: bool = False
) -> None:
    """Stream one answer to standard output. With `loaded`, the seconds that loading took, statistics follow
    on standard error.
    """
    state = pair.start(prompt, **options)
    _note([*notes.of_model(pair, options), *notes.of_prompt(pair, prompt, options["chat"])])
    clock = _Clock()
    _, cycles = stream(pair, clock.watched(pair.cycles(state)), options["stop"], mark)
    if loaded is not None:
        print_stats(pair, cycles, clock, loaded)


def converse(pair: LLM, options: dict[str, Any], *, loaded: float | None = None, mark: bool = False) -> None:
    """A conversation until Ctrl-D: each turn reads only what is new, the rest is still in the KV cache.

    Ctrl-C stops an answer, which stays in the conversation as far as it came; again, it leaves.
    """
    pair.encode([{"role": "user", "content": "?"}])  # without a chat template, say so now
    _note(notes.of_model(pair, options))
    console = Console(highlight=False)
    console.print("Write a message; /help lists commands, Ctrl-C stops an answer, Ctrl-D ends.", style="dim")
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
        if question in _LEAVE:
            return
        if question in _RESET:
            messages, state = [], None
        elif re.fullmatch(r"/\w*", question):  # a path or a regular expression is a message
            known = question in ("/help", "/")
            console.print(_HELP if known else f"{question} is no command. {_HELP}", style="dim")
        if not question or question in _RESET or re.fullmatch(r"/\w*", question):
            continue
        asked = [*messages, {"role": "user", "content": question}]
        clock = _Clock()
        try:
            if state is None:
                state = pair.start(asked, **options)
            else:
                pair.continue_with(state, asked, max_new_tokens=options["max_new_tokens"])
        except CoralError as error:  # too long for the context, for example: the conversation is not lost
            console.print(f"{error} /reset starts over.", style="yellow")
            continue
        with _Stop() as stop:
            watched = stop.watched(clock.watched(pair.cycles(state)))
            text, cycles = stream(pair, watched, options["stop"], mark)
        messages = [*asked, {"role": "assistant", "content": text}]
        if stop.asked:
            console.print("Stopped; Ctrl-C again leaves.", style="dim")
        elif loaded is not None:
            print_stats(pair, cycles, clock, loaded)


class _Stop:
    """While entered, Ctrl-C asks for an end of the answer instead of raising; a second one raises."""

    asked = False

    def __enter__(self) -> _Stop:
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def watched(self, cycles: Iterator[Cycle]) -> Iterator[Cycle]:
        """The cycles until it is asked for; no cycle is cut."""
        for cycle in cycles:
            yield cycle
            if self.asked:
                return


def stream(
    pair: LLM, cycles: Iterator[Cycle], stop: Stop, mark: bool, console: Console | None = None
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


class _Clock:
    """When writing began, when its first tokens were there, and when its last."""

    def __init__(self) -> None:
        self.begin = self.first = self.last = perf_counter()

    def watched(self, cycles: Iterable[Cycle]) -> Iterator[Cycle]:
        """The cycles, each timed when it ends. What is done with one counts for the next."""
        for i, cycle in enumerate(cycles):
            self.last = perf_counter()
            self.first = self.first if i else self.last
            yield cycle


def print_stats(pair: LLM, cycles: Iterable[Cycle], clock: _Clock, loaded: float) -> None:
    """On standard error: loading, the first token, writing, which begins behind it, and what drafting did."""
    first, *rest = cycles
    tokens, seconds = sum(len(cycle.tokens) for cycle in rest), clock.last - clock.first
    line = f"{pair.target.precision}, {pair.target.backend}: "
    line += f"load {loaded:.1f} s, first token {clock.first - clock.begin:.2f} s"
    if rest:
        line += f", then {tokens} tokens in {seconds:.2f} s ({tokens / seconds:.1f} tokens/s)"
    if isinstance(pair.proposer, Plain):
        line += ", without a drafter; --drafter ngram needs no training and may be faster"
    else:
        every = [first, *rest]
        drafted, accepted = (sum(getattr(c, name) for c in every) for name in ("num_drafted", "num_accepted"))
        plain = sum(cycle.num_drafted == 0 for cycle in every)
        line += (
            f"; {len(every)} cycles ({plain} of them plain steps), tau {acceptance_length(every):.2f}, "
            f"{accepted} of {drafted} draft tokens accepted"
        )
        if rest:
            spent = (sum(getattr(c, name) for c in rest) for name in ("draft_seconds", "verify_seconds"))
            drafting, verification = (part / seconds for part in spent)
            line += f", drafting {drafting:.0%}, verification {verification:.0%} of the time"
        line += f", tree {pair.tree_size} ({pair.tree_size_origin})"
    Console(stderr=True, highlight=False, soft_wrap=True).print(line, style="dim")
