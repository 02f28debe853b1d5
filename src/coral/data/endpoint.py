"""Training answers from servers that speak the OpenAI chat API: vLLM, SGLang, or whatever else does.

`concurrency` conversations are under way at once, over all endpoints together; each turn is one request to
`/chat/completions`. What may heal (429, 5xx, a timeout, a lost connection, a reply that cannot be read) is
tried again after an exponential wait with jitter, at whichever endpoint is then the least busy; what cannot
(another 4xx) fails at once. An endpoint that has given nothing but failures for a while is left out.

The API key goes into the header of requests and nowhere else: where a server echoes it, what is told and kept
shows *** instead, and an answer that holds it is no answer.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
from rich.console import Console

from coral.data.conversations import Message
from coral.data.jobs import Answer, Job
from coral.data.replies import (
    HEADERS,
    LARGEST_LIST,
    OF_THE_ENDPOINT,
    FailedError,
    line,
    read_answer,
    read_models,
    receive,
    receive_now,
    redacted,
)
from coral.errors import CoralError

LONGEST_WAIT = 60.0  # seconds between two tries, unless the server asks for more
CONNECT = 10.0  # seconds
_UNREACHABLE = "the endpoint cannot be reached"


@dataclass
class Endpoint:
    """A server by its base address (usually ending in /v1), with its load and failures."""

    url: str
    busy: int = 0
    strikes: int = 0  # failures since its last answer
    failing_since: float = 0.0
    dead: str = ""  # why it is left out


@dataclass(frozen=True)
class Servers:
    """Endpoints that serve one model, and how they are asked."""

    endpoints: list[Endpoint]
    model: str
    api_key: str | None = None
    concurrency: int = 64
    """Conversations under way at once."""
    retries: int = 5
    """Tries of a request after the first."""
    timeout: float = 600.0
    """Seconds that an answer may take."""
    first_wait: float = 1.0
    """Seconds before the first retry, about; each later wait is twice as long."""
    patience: float = 30.0
    """An endpoint is left out after three failures or more with no answer between, when they have gone on for
    so many seconds, or when it was not there at the last try of a request."""
    console: Console | None = None

    @property
    def alive(self) -> list[Endpoint]:
        return [endpoint for endpoint in self.endpoints if not endpoint.dead]

    def refuse_dead(self) -> None:
        """Raise CoralError when no endpoint is left."""
        if not self.alive:
            why = ", ".join(f"{each.url}: {each.dead}" for each in self.endpoints)
            raise CoralError(
                f"no endpoint answers any more ({why}); start one, and run the same command to go on."
            )

    def leave_out(self, endpoint: Endpoint, why: str) -> None:
        """Ask this endpoint nothing more, and say so."""
        if not endpoint.dead:
            endpoint.dead = self.told(why)
            _say(self.console, f"{endpoint.url} is left out: {endpoint.dead}")

    def told(self, text: str) -> str:
        """What a server says, in one short line and without the key."""
        return line(redacted(text, self.api_key))

    def most_bytes(self, max_new_tokens: int) -> int:
        """Upper bound of a reply's size: far more than the longest tokens, escaped, with their JSON."""
        return (1 << 20) + 256 * max_new_tokens


def connect(
    urls: str | Sequence[str],
    model: str | None = None,
    *,
    api_key: str | None = None,
    console: Console | None = None,
    **options: Any,
) -> Servers:
    """Find out which of the addresses answer, and check that they serve `model` (None: the only one served).

    `options` are those of `Servers`. An address without a path gets `/v1`. One that does not answer is left
    out, and named on the `console`.

    Raises:
        CoralError: an address that cannot be read, none that answers, or another model; names those served.
    """
    if min(options.get("concurrency", 1), options.get("retries", 0) + 1) < 1:
        raise CoralError("concurrency must be at least 1, and retries at least 0.")
    api_key = (api_key or "").strip() or None
    if api_key and not (api_key.isascii() and api_key.isprintable()):
        raise CoralError(
            "the API key holds characters that a header cannot; check its variable (--api-key-env)."
        )
    urls = [urls] if isinstance(urls, str) else urls
    found: list[Endpoint] = []
    served: list[str] = []
    problems: list[str] = []
    with httpx2.Client(headers=_headers(api_key), timeout=CONNECT) as client:
        for url in map(_base, dict.fromkeys(urls)):
            try:
                names = _models(client, url)
            except FailedError as error:
                problems.append(line(redacted(f"{url} {error.problem}", api_key)))
                _say(console, f"{problems[-1]}; it is left out")
                continue
            names = [line(redacted(name, api_key)) for name in names]
            if names and model is not None and model not in names:
                raise CoralError(f"{url} serves {', '.join(names)}, not {model}; name one of them (--model).")
            found.append(Endpoint(url))
            served += names
    if not found:
        raise CoralError(f"no endpoint answers: {', '.join(problems) or 'none is named'}; check the address.")
    if model is None:
        if len(different := set(served)) != 1:
            names = sorted(different)
            raise CoralError(
                f"the endpoints serve {', '.join(names) or 'unnamed models'}; name one (--model)."
            )
        model = served[0]
    return Servers(found, model, api_key, console=console, **options)


def answer_over_http(
    servers: Servers, *, max_new_tokens: int, seed: int = 0, keep_unfinished: bool = True
) -> Answer:
    """Answers from `servers`, each of at most `max_new_tokens`; their chat template renders the messages.

    The order is that in which conversations end. At temperature 0 an answer depends on the prompt alone, up
    to near ties; above, each record has a seed of its own, which servers honour as far as they do.
    """

    def answer(jobs: Iterator[Job], finish: Callable[[Job], None]) -> None:
        asyncio.run(share(jobs, finish))

    async def share(jobs: Iterator[Job], finish: Callable[[Job], None]) -> None:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=servers.concurrency)
        timeout = httpx2.Timeout(None, connect=CONNECT)  # the whole of a request is timed, not its parts
        async with httpx2.AsyncClient(
            headers=_headers(servers.api_key), limits=limits, timeout=timeout
        ) as client:

            async def work() -> None:
                for job in jobs:  # all take from one iterator
                    if not job.before:
                        await converse(job, client)
                    finish(job)

            await asyncio.gather(*(work() for _ in range(servers.concurrency)))

    async def converse(job: Job, client: httpx2.AsyncClient) -> None:
        """Turn after turn. A turn that is refused ends the conversation with the answers it has; where the
        failure may heal, all of it is left to be asked again."""
        opening = list(job.messages)
        going_on = True
        while going_on:
            job.messages.append(job.users.pop(0))
            job.asked = True
            try:
                text, finished, tokens = await _request(servers, client, body(job))
                if redacted(text, servers.api_key) != text:
                    raise FailedError("the answer holds the API key", lasting=True)
            except FailedError as error:
                job.problem, job.detail = error.problem, servers.told(error.detail)
                job.lasting = not error.heals
                job.messages = opening if error.heals else job.messages[:-1]
                return
            job.tokens += tokens
            going_on = job.take(text, finished, keep_unfinished)

    def body(job: Job) -> dict[str, Any]:
        messages: list[Message] = [{key: said[key] for key in ("role", "content")} for said in job.messages]
        return {
            "model": servers.model,
            "messages": messages,
            "max_tokens": max_new_tokens,
            "temperature": job.temperature,
            "top_p": 1.0,
            "seed": seed + job.sequence_id,
        }

    return answer


async def _request(
    servers: Servers, client: httpx2.AsyncClient, body: dict[str, Any]
) -> tuple[str, bool, int]:
    """The answer, whether it is finished, and its tokens; FailedError when the last try has failed."""
    failure = FailedError("no endpoint answers any more")
    for wait in [*(servers.first_wait * 2**i for i in range(servers.retries)), None]:
        if not servers.alive:
            raise FailedError("no endpoint answers any more")
        # A strike weighs as much as a request under way: what fails at once must not draw all the others.
        endpoint = min(servers.alive, key=lambda each: each.busy + each.strikes)
        endpoint.busy += 1
        try:
            answer = await asyncio.wait_for(_ask(servers, client, endpoint, body), servers.timeout)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            failure = FailedError(_UNREACHABLE, str(error))
        except (asyncio.TimeoutError, httpx2.TimeoutException):
            failure = FailedError("timed out")
        except httpx2.HTTPError as error:
            failure = FailedError("the connection was lost", str(error))
        except FailedError as error:
            failure = error
        else:
            endpoint.strikes = 0
            return answer
        finally:
            endpoint.busy -= 1
        if not failure.heals:
            endpoint.strikes = 0  # it is well; the request was not
            raise failure
        _strike(servers, endpoint, failure, last=wait is None)
        if wait is not None:
            await asyncio.sleep(max(failure.wait, min(wait, LONGEST_WAIT) * random.uniform(0.5, 1.0)))
    raise failure


def _strike(servers: Servers, endpoint: Endpoint, failure: FailedError, last: bool) -> None:
    """Count a failure of the endpoint itself, and leave it out when it has failed for too long."""
    if failure.status == 429:  # it is busy, not broken
        return
    if failure.status in OF_THE_ENDPOINT:
        servers.leave_out(endpoint, failure.problem + (failure.detail and f" ({failure.detail})"))
    now = time.monotonic()
    endpoint.failing_since = endpoint.failing_since if endpoint.strikes else now
    endpoint.strikes += 1
    # A request may be the cause of what it meets, but not of a server that is not there.
    gone = last and failure.problem == _UNREACHABLE
    if endpoint.strikes >= 3 and (gone or now - endpoint.failing_since > servers.patience):
        servers.leave_out(endpoint, f"{endpoint.strikes} failures and no answer, the last: {failure.problem}")


async def _ask(
    servers: Servers, client: httpx2.AsyncClient, endpoint: Endpoint, body: dict[str, Any]
) -> tuple[str, bool, int]:
    async with client.stream("POST", f"{endpoint.url}/chat/completions", json=body) as response:
        reply = await receive(response, servers.most_bytes(body["max_tokens"]))
    return read_answer(reply, body["max_tokens"])


def _models(client: httpx2.Client, url: str) -> list[str]:
    """Names of the models that the endpoint serves; empty if it does not list them."""
    try:
        with client.stream("GET", f"{url}/models") as response:
            return read_models(receive_now(response, LARGEST_LIST, 3 * CONNECT))
    except httpx2.HTTPError as error:
        raise FailedError(f"does not answer ({error})") from error


def _base(url: str) -> str:
    try:
        parsed = httpx2.URL(url.rstrip("/"))
    except httpx2.InvalidURL:
        parsed = httpx2.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query:
        shown = url.split("?")[0].rpartition("@")[2]  # what may be secret is not told on
        raise CoralError(
            f"cannot read --endpoint {shown!r}; write it as http://HOST:PORT/v1 (a key is read from the "
            "variable that --api-key-env names)."
        )
    return str(parsed) if parsed.path not in ("", "/") else f"{str(parsed).rstrip('/')}/v1"


def _headers(api_key: str | None) -> dict[str, str]:
    return HEADERS | ({"Authorization": f"Bearer {api_key}"} if api_key else {})


def _say(console: Console | None, text: str) -> None:
    if console is not None:
        console.print(text, highlight=False, markup=False)
