"""One request while its texts are written: what the worker says of them becomes one object, or a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import Request

from coral.decoding.state import State
from coral.errors import CoralError
from coral.serving.answer import Answer, Piece, Text
from coral.serving.metrics import Clock
from coral.serving.openai import Asked, Refused
from coral.serving.worker import Event

if TYPE_CHECKING:
    from coral.serving.http import Server

_LOOK = 0.2  # seconds between looks at whether a client that waits is still there


class Writing:
    """The texts of one request while they are written; they are cancelled when whoever reads has gone."""

    def __init__(self, server: Server, asked: Asked, states: Sequence[State]) -> None:
        self.server, self.states, self.asked = server, states, asked
        stop, least = asked.options["stop"], asked.least
        echoes = [self._echo(i) for i in range(len(states))] if asked.echo else [""] * len(states)
        self.texts = [Text(server.llm.tokenizer, stop, least, echo) for echo in echoes]
        prompts = sum(state.prompt_length for state in states[:: asked.n])
        self.answer = Answer(asked, server.name, prompts, self.texts, server.names)
        self.clocks = [Clock(server.metrics, state.prompt_length) for state in states]

    def _echo(self, index: int) -> str:
        """The prompt of a text, as it was given or, of ids, as they are decoded."""
        prompt: Any = self.asked.prompts[index // self.asked.n]
        if isinstance(prompt, str):
            return prompt
        text = self.server.llm.tokenizer.decode(
            prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    async def pieces(self, request: Request) -> AsyncGenerator[tuple[int, Piece], None]:
        """Index and next piece of a text whenever there is one; the text's `finish` is set with its last.

        Raises:
            Refused: no more comes.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        index = {state: i for i, state in enumerate(self.states)}
        going = set(self.states)
        try:
            self.server.worker.submit(self.states, lambda e: _tell(loop, events, e))
            while going:
                try:
                    event = await asyncio.wait_for(events.get(), _LOOK)
                except asyncio.TimeoutError:
                    if await request.is_disconnected():
                        return
                    continue
                if event.error or event.cycle is None:
                    raise refusal(event.error)
                i = index[event.state]
                self.clocks[i].cycle(event.cycle, event.finish)
                if event.finish:
                    going.discard(event.state)
                    self.server.open -= 1
                for piece in self._said(i, event):
                    yield i, piece
                if going and await request.is_disconnected():
                    return
        finally:
            self.server.worker.cancel([*going])
            self.server.open -= len(going)

    def _said(self, index: int, event: Event) -> list[Piece]:
        """What an event adds to a text, its prompt in front if that is to be repeated."""
        text, state, scored = self.texts[index], event.state, event.scored
        assert event.cycle is not None
        first: list[Piece] = []
        if self.asked.echo and not text.cycles:
            of_prompt = len(scored) - len(event.cycle.tokens) if scored else 0
            prompt = state.tokens[: state.prompt_length]
            first = [text.opening(prompt, scored[:of_prompt] if scored else None)]
            scored = scored[of_prompt:]
        return [*first, text.push(event.cycle, event.finish, scored)]

    async def whole(self, request: Request) -> dict[str, Any]:
        said: list[list[Piece]] = [[] for _ in self.states]
        async with aclosing(self.pieces(request)) as pieces:
            async for i, piece in pieces:
                said[i].append(piece)
        if not all(text.finish for text in self.texts):
            raise Refused("the client has gone.", 499)
        return self.answer.whole(said)

    async def stream(self, request: Request) -> AsyncGenerator[str, None]:
        """The chunks of the answer as server-sent events.

        Raises:
            Refused: nothing was written.
        """
        answer, opened = self.answer, set[int]()
        try:
            async with aclosing(self.pieces(request)) as pieces:
                async for i, piece in pieces:
                    chunks = [] if i in opened else answer.opening(i)
                    opened.add(i)
                    for chunk in (*chunks, *answer.piece(i, piece)):
                        yield _event(chunk)
                    if piece.finish:
                        yield _event(answer.closing(i))
            for chunk in answer.last():
                yield _event(chunk)
        except Refused as refused:
            if not opened:
                raise
            yield _event(refused.body)
        yield "data: [DONE]\n\n"


async def going_on(first: str, events: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    """A stream whose first event was taken already."""
    async with aclosing(events):
        yield first
        async for event in events:
            yield event


def _tell(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    loop.call_soon_threadsafe(events.put_nowait, event)


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def refusal(error: Exception | None) -> Refused:
    """What the client is told of an error: the words are the client's own only where they are for users."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, CoralError):
        return Refused(str(error))
    return Refused("the server failed; its log says why.", 500, kind="internal_error")
