"""The server: OpenAI's routes over a `Worker`. Nothing here runs the model, or torch on the event loop."""

from __future__ import annotations

import asyncio
import hmac
import json
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from coral.decoding.log_probs import LogProbs
from coral.decoding.state import State
from coral.errors import CoralError
from coral.serving import openai
from coral.serving.metrics import Metrics
from coral.serving.openai import Asked, Refused
from coral.serving.token_names import Names
from coral.serving.worker import Worker
from coral.serving.writing import Writing, going_on, refusal

if TYPE_CHECKING:
    from coral.api import LLM

_PAGE = Path(__file__).with_name("page.html")
_PAGE_ALONE = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
"""The page speaks to this server alone, and stands in no other page."""
_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error",
          405: "invalid_request_error", 500: "internal_error"}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    queue: texts that may wait, beside those that are written at once.
    body: bytes of a request. longest: tokens of an answer whose request names no limit.
    """

    queue: int = 64
    body: int = 1 << 20
    longest: int = 1024


class Server:
    """What the routes share.

    open: texts under way or waiting; touched by the event loop alone.
    """

    def __init__(self, worker: Worker, name: str, keys: Sequence[str], limits: Limits) -> None:
        self.worker, self.name, self.limits = worker, name, limits
        self.keys = [key.encode() for key in keys]
        self.metrics, self.open = Metrics(name), 0
        self._encoding = threading.Lock()  # tokenizers may be set up anew by each call

    def authorise(self, request: Request) -> None:
        """Raise Refused without one of the keys, where there are any; each is compared in constant time."""
        if not self.keys:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if sum([hmac.compare_digest(given, key) for key in self.keys]) == 0:
            raise Refused("the API key is missing or wrong.", 401, code="invalid_api_key", kind=_KINDS[401])

    @cached_property
    def names(self) -> Names:
        return Names(self.llm.tokenizer)

    @property
    def llm(self) -> LLM:
        if self.worker.llm is None:
            raise Refused("the model is still loading.", 503, kind="unavailable_error")
        return self.worker.llm

    async def body(self, request: Request) -> Any:
        """The JSON of a request that may be answered: with its key and size, and once there is a model."""
        self.authorise(request)
        _ = self.llm
        body = bytearray()
        try:
            async for piece in request.stream():
                body += piece
                if len(body) > self.limits.body:
                    raise Refused(f"the body is longer than {self.limits.body} bytes.", 413)
        except ClientDisconnect as error:
            raise Refused("the client has gone.", 499) from error
        try:
            return json.loads(body.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise Refused("the body is no JSON in UTF-8.") from error

    def check_model(self, model: str | None) -> None:
        if model not in (None, self.name):
            message = f"the model {model!r} is not served here; {self.name} is."
            raise Refused(message, 404, "model", "model_not_found", _KINDS[404])

    async def answer(self, request: Request, read: Callable[[Any, int], Asked]) -> Response:
        """Answer a request that `read` understands, as one object or as a stream of events."""
        asked = read(await self.body(request), self.limits.longest)
        self.check_model(asked.model)
        count, most = len(asked.prompts) * asked.n, self.worker.at_once + self.limits.queue
        if count > most:
            raise Refused(f"{count} texts are asked for; at most {most} may be at once.", param="n")
        self.open += self._refuse_when_full(count, most)
        try:
            written = Writing(self, asked, await asyncio.to_thread(self._states, asked))
        except BaseException:
            self.open -= count
            raise
        if not asked.stream:
            return JSONResponse(await written.whole(request))
        events = written.stream(request)
        first = await anext(events)  # what is refused until here is no stream
        return StreamingResponse(going_on(first, events), media_type="text/event-stream", headers=_UNBUFFERED)

    def _refuse_when_full(self, count: int, most: int) -> int:
        if self.open + count > most:
            message = f"{self.open} texts are under way or waiting, and no more may; try again."
            raise Refused(message, 429, code="queue_full", kind="rate_limit_error")
        return count

    def _states(self, asked: Asked) -> list[State]:
        """The texts that are asked for, none of which has begun."""
        llm, engine = self.llm, self.worker.engine
        assert engine is not None
        with self._encoding:
            states = [
                llm.start(prompt, sequence_id=i * asked.n + j, **asked.options)
                for i, prompt in enumerate(asked.prompts)
                for j in range(asked.n)
            ]
        for state in states:
            state.drafts, state.min_length = asked.drafting, state.prompt_length + asked.least
            if asked.log_probs is not None:
                state.log_probs = LogProbs(asked.log_probs, prompt=asked.echo)
            engine.check(state)
        return states

    async def tokenize(self, request: Request) -> Response:
        model, prompt = openai.read_tokenize(await self.body(request))
        self.check_model(model)

        def encode() -> list[int]:
            with self._encoding:
                return self.llm.encode(prompt, chat=not isinstance(prompt, str))

        ids = await asyncio.to_thread(encode)
        longest = self.llm.target.context_length
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": longest})

    async def detokenize(self, request: Request) -> Response:
        model, ids = openai.read_detokenize(await self.body(request))
        self.check_model(model)
        if ids and max(ids) >= self.llm.target.vocab_size:
            raise Refused(f"tokens holds {max(ids)}, which is no token id.", param="tokens")
        return JSONResponse({"prompt": await asyncio.to_thread(self.llm.tokenizer.decode, ids)})


def create_app(worker: Worker, name: str, keys: Sequence[str] = (), limits: Limits | None = None) -> FastAPI:
    """The application. The worker is started and drained with it.

    Args:
        name: the model's, in requests and answers.
        keys: API keys, of which each request to the model must bring one; none: all are answered.
    """
    server = Server(worker, name, keys, limits or Limits())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(title="CORAL", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = server
    _add_errors(app)
    _add_facts(app, server)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await server.answer(request, openai.read_chat)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await server.answer(request, openai.read_completion)

    app.add_api_route("/tokenize", server.tokenize, methods=["POST"], response_model=None)
    app.add_api_route("/detokenize", server.detokenize, methods=["POST"], response_model=None)
    return app


def _add_facts(app: FastAPI, server: Server) -> None:
    """The routes that say how the server is."""

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers=_PAGE_ALONE)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        server.authorise(request)
        longest = server.llm.target.context_length
        model = {"id": server.name, "object": "model", "created": 0, "owned_by": "coral"}
        return JSONResponse({"object": "list", "data": [{**model, "max_model_len": longest}]})

    @app.get("/health")
    async def health() -> Response:
        _ = server.llm
        return JSONResponse({"status": "ok"})

    @app.get("/version")
    async def its_version() -> Response:
        return JSONResponse({"version": version("coral-drafter")})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.exposition(server.worker.status), media_type=CONTENT_TYPE_LATEST)


def _add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape, and no traceback to a client."""

    async def on_refused(_: Request, error: Exception) -> Response:
        refused = refusal(error)
        headers = {"Retry-After": "1"} if refused.status in (429, 503) else {}
        return JSONResponse(refused.body, refused.status, headers)

    async def on_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = _KINDS.get(error.status_code, "invalid_request_error")
        return JSONResponse(Refused(str(error.detail), kind=kind).body, error.status_code)

    for kind in (Refused, CoralError, Exception):
        app.add_exception_handler(kind, on_refused)
    app.add_exception_handler(HTTPException, on_http)
