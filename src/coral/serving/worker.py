"""The thread that owns the model: it loads it, and steps the engine while there is something to write."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch

from coral.decoding.log_probs import Scored
from coral.decoding.state import Cycle, State
from coral.errors import CoralError
from coral.serving.engine import Engine
from coral.target.target import Target

if TYPE_CHECKING:
    from coral.api import LLM

_log = logging.getLogger("coral.serving")


@dataclass(frozen=True)
class Event:
    """What became of a text in a cycle.

    finish: why it ended with this cycle, "stop" or "length"; "": it goes on.
    scored: log-probabilities of the tokens, where they are wanted; the prompt's come with its first cycle.
    error: why nothing more comes; then there is no cycle.
    """

    state: State
    cycle: Cycle | None = None
    finish: str = ""
    error: Exception | None = None
    scored: Sequence[Scored] = ()


@dataclass(frozen=True)
class Status:
    """What the engine holds, and what it has read up to now."""

    running: int = 0
    waiting: int = 0
    used: float = 0.0  # share of the memory
    prompt_tokens: int = 0
    reused_tokens: int = 0


Listener = Callable[[Event], None]


def _nothing(engine: Engine) -> None:
    """A command that asks for nothing."""


class Worker:
    """Takes texts from any thread and tells their listeners, on its own thread, what became of them.

    Args:
        load: makes the model.
        at_once, memory: see `Engine`; without `memory`, half of what is free once the model is loaded.
        failed: called if it cannot be loaded; `failure` says why.

    Attributes:
        llm, engine: None while the model is loaded.
    """

    def __init__(
        self,
        load: Callable[[], LLM],
        at_once: int,
        memory: float | None = None,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        self._load, self.at_once, self._memory, self.failed = load, at_once, memory, failed
        self.llm: LLM | None = None
        self.engine: Engine | None = None
        self.failure: BaseException | None = None
        self.status = Status()
        self._commands = queue.SimpleQueue[Callable[[Engine], None] | None]()
        self._listeners: dict[State, Listener] = {}  # of the texts under way; the thread's own
        self._thread = threading.Thread(target=self._run, name="coral-model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Write what was submitted to its end, and end the thread."""
        self._commands.put(None)
        self._thread.join()

    def submit(self, states: Sequence[State], listener: Listener) -> None:
        """Have texts written, see `Engine.submit`; what cannot be written is an event, too."""

        def command(engine: Engine) -> None:
            for state in states:
                try:
                    engine.submit(state)
                except CoralError as error:
                    listener(Event(state, error=error))
                else:
                    self._listeners[state] = listener

        self._commands.put(command)

    def cancel(self, states: Sequence[State]) -> None:
        """Write no more of them; those that have ended stay as they are."""

        def command(engine: Engine) -> None:
            for state in states:
                self._listeners.pop(state, None)
                engine.cancel(state)

        self._commands.put(command)

    def _run(self) -> None:
        try:
            llm = self._load()
            memory = self._memory or _free(llm.target) / 2
            engine = Engine(llm.target, llm.proposer, llm.tree_size, self.at_once, memory)
        except BaseException as error:
            self.failure = error
            self.failed()
            return
        self.llm, self.engine = llm, engine
        going_on = True
        while going_on or engine.waiting + engine.running:
            going_on = self._obey(engine) and going_on
            if engine.waiting + engine.running:
                self._step(engine)
            self.status = Status(
                engine.running,
                engine.waiting,
                engine.used / (engine.memory or 1),
                engine.prompt_tokens,
                engine.reused_tokens,
            )

    def _obey(self, engine: Engine) -> bool:
        """Do what was asked meanwhile, and wait for it if there is nothing to write; whether to go on."""
        command = self._commands.get() if not (engine.waiting + engine.running) else _nothing
        with suppress(queue.Empty):
            while command:
                command(engine)
                command = self._commands.get_nowait()
            return False
        return True

    def _step(self, engine: Engine) -> None:
        try:
            events = [_event(state, cycle) for state, cycle in engine.step()]
        except Exception as error:
            if not isinstance(error, CoralError):
                _log.exception("a step of the engine failed")
            events = [Event(state, error=error) for state in self._listeners]
            engine.clear()
        for event in events:
            ended = event.finish or event.error
            listener = self._listeners.pop(event.state, None) if ended else self._listeners.get(event.state)
            if listener:
                with suppress(RuntimeError):  # the listener's loop has ended
                    listener(event)


def _event(state: State, cycle: Cycle) -> Event:
    """What a cycle did, the reason for an end as OpenAI calls it."""
    finish = ("stop" if state.is_at_end else "length") if state.done else ""
    return Event(state, cycle, finish, scored=state.log_probs.take() if state.log_probs else ())


def _free(target: Target) -> Any:
    """Bytes that are free where the target is."""
    if target.device.type == "cuda":
        return torch.cuda.mem_get_info(target.device)[0]
    return psutil.virtual_memory().available
