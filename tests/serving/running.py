"""A server on loopback, as the tests of it want one."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import openai
import uvicorn

from coral.serving.http import Limits, create_app
from coral.serving.worker import Worker

LIMITS = Limits(queue=40, body=20_000, longest=24)
QUESTION = [{"role": "user", "content": "the thing in an era"}]


class Server:
    """A server of its own thread on a free port."""

    def __init__(self, load: Any, *, keys: tuple[str, ...] = (), limits: Limits = LIMITS, at_once: int = 8):
        self.worker = Worker(load, at_once)
        app = create_app(self.worker, "tiny", keys, limits)
        self.http, self.socket = app.state.server, socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        self.thread = threading.Thread(target=self.uvicorn.run, args=([self.socket],))

    def __enter__(self) -> Server:
        self.thread.start()
        until(lambda: self.uvicorn.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.uvicorn.should_exit = True
        self.thread.join()

    def ready(self) -> Server:
        until(lambda: self.worker.llm is not None)
        return self

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, **options)

    @property
    def is_idle(self) -> bool:
        status = self.worker.status
        return self.http.open == status.running == status.waiting == 0 and not self.worker._listeners


def until(true: Any) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)
