"""Training answers from servers that speak the OpenAI chat API: vLLM, SGLang, or whatever else does.

`concurrency` conversations are under way at once, over all endpoints together; each turn is one request to
`/chat/completions`. What may heal (429, 5xx, a timeout, a lost connection, a reply that cannot be read) is
tried again after an exponential wait with jitter, at whichever endpoint is then the least busy; what cannot
(another 4xx) fails at once. An endpoint that has given nothing but failures for a while is left out.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from rich.console import Console

from coral.data.conversations import Message
from coral.data.regenerate import Answer, Job
from coral.errors import CoralError

LONGEST_WAIT = 60.0  # seconds between two tries, unless the server asks for more
LONGEST_RETRY_AFTER = 600.0
CONNECT = 10.0  # seconds
_HEALS = {408, 409, 425, 429}  # and all of 5xx
_UNREACHABLE = "the endpoint cannot be reached"
_OF_THE_ENDPOINT = {401, 404}  # no key, no such model: what one request is told is true of all


@dataclass
class Endpoint:
    """A server by its base address (which ends in /v1, usually), and how it has been doing."""

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

    def leave_out(self, endpoint: Endpoint, why: str) -> None:
        """Ask this endpoint nothing more, and say so."""
        if not endpoint.dead:
            endpoint.dead = why
            _say(self.console, f"{endpoint.url} is left out: {why}")


class _FailedError(Exception):
    """A request without an answer: the problem, and whether the same request may succeed later (`heals`)."""

    def __init__(self, problem: str, detail: str = "", *, status: int = 0, wait: float = 0.0) -> None:
        super().__init__(problem)
        self.problem, self.detail, self.status, self.wait = problem, detail, status, wait

    @property
    def heals(self) -> bool:
        return self.status < 300 or self.status >= 500 or self.status in _HEALS | _OF_THE_ENDPOINT


def connect(
    urls: Sequence[str],
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
    found: list[Endpoint] = []
    served: list[str] = []
    problems: list[str] = []
    with httpx2.Client(headers=_headers(api_key), timeout=CONNECT) as client:
        for url in map(_base, dict.fromkeys(urls)):
            try:
                names = _models(client, url)
            except _FailedError as error:
                problems.append(f"{url} {error.problem}")
                _say(console, f"{problems[-1]}; it is left out")
                continue
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
            except _FailedError as error:
                job.problem, job.detail, job.lasting = error.problem, error.detail, not error.heals
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
    """The answer, whether it is finished, and its tokens; _FailedError when the last try has failed."""
    failure = _FailedError("no endpoint answers any more")
    for wait in [*(servers.first_wait * 2**i for i in range(servers.retries)), None]:
        if not servers.alive:
            raise _FailedError("no endpoint answers any more")
        # A strike weighs as much as a request under way: what fails at once must not draw all the others.
        endpoint = min(servers.alive, key=lambda each: each.busy + each.strikes)
        endpoint.busy += 1
        try:
            sent = client.post(f"{endpoint.url}/chat/completions", json=body)
            answer = _read(await asyncio.wait_for(sent, servers.timeout))
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            failure = _FailedError(_UNREACHABLE, str(error))
        except (asyncio.TimeoutError, httpx2.TimeoutException):
            failure = _FailedError("timed out")
        except httpx2.HTTPError as error:
            failure = _FailedError("the connection was lost", str(error))
        except _FailedError as error:
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


def _strike(servers: Servers, endpoint: Endpoint, failure: _FailedError, last: bool) -> None:
    """Count a failure of the endpoint itself, and leave it out when there is no more hope."""
    if failure.status == 429:  # it is busy, not broken
        return
    if failure.status in _OF_THE_ENDPOINT:
        servers.leave_out(endpoint, failure.problem + (failure.detail and f" ({failure.detail})"))
    now = time.monotonic()
    endpoint.failing_since = endpoint.failing_since if endpoint.strikes else now
    endpoint.strikes += 1
    # A request may be the cause of what it meets, but not of a server that is not there.
    gone = last and failure.problem == _UNREACHABLE
    if endpoint.strikes >= 3 and (gone or now - endpoint.failing_since > servers.patience):
        servers.leave_out(endpoint, f"{endpoint.strikes} failures and no answer, the last: {failure.problem}")


def _read(response: httpx2.Response) -> tuple[str, bool, int]:
    """What `/chat/completions` answered; _FailedError where it holds no answer."""
    _refuse_error(response)
    try:
        reply = response.json()
        choice = reply["choices"][0]
        text, reason = choice["message"]["content"] or "", choice["finish_reason"]
        text.encode()  # half of a surrogate pair cannot be stored
        tokens = int((reply.get("usage") or {}).get("completion_tokens", 0))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _FailedError("the reply cannot be read", repr(error)) from error
    if reason not in ("stop", "length"):
        raise _FailedError("the answer ended neither at its end nor at its limit", str(reason))
    # A cut may fall inside a character.
    return (text, True, tokens) if reason == "stop" else (text.rstrip("\ufffd"), False, tokens)


def _models(client: httpx2.Client, url: str) -> list[str]:
    """Names that the endpoint serves; none if it does not tell."""
    try:
        response = client.get(f"{url}/models")
        if response.status_code == 404:
            return []
        _refuse_error(response)
        return [str(model["id"]) for model in response.json()["data"]]
    except httpx2.HTTPError as error:
        raise _FailedError(f"does not answer ({error})") from error
    except (ValueError, LookupError, TypeError) as error:
        raise _FailedError("does not speak the OpenAI API (its /models cannot be read)") from error


def _refuse_error(response: httpx2.Response) -> None:
    status = response.status_code
    if status == 200:
        return
    hints = {401: " and wants another API key (--api-key-env)", 404: ": no such model or path"}
    raise _FailedError(
        f"answers {status}{hints.get(status, '')}",
        _message(response),
        status=status,
        wait=_retry_after(response),
    )


def _message(response: httpx2.Response) -> str:
    """What the server says of an error, in one line."""
    try:
        reply = response.json()
        error = reply.get("error", reply)
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(str(text).split())[:200]


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the server asks to wait (given as such, or as a date); 0 if it does not."""
    given = response.headers.get("retry-after", "")
    try:
        seconds = float(given)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(given) - datetime.now(timezone.utc)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)


def _base(url: str) -> str:
    try:
        parsed = httpx2.URL(url.rstrip("/"))
    except httpx2.InvalidURL:
        parsed = httpx2.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise CoralError(f"cannot read --endpoint {url!r}; write it as http://HOST:PORT/v1.")
    return str(parsed) if parsed.path not in ("", "/") else f"{str(parsed).rstrip('/')}/v1"


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _say(console: Console | None, text: str) -> None:
    if console is not None:
        console.print(text, highlight=False, markup=False)
