"""Does any request break the server? SmolLM2 on loopback, requests from a seed.

    python checks/fuzz_server.py --requests 2000 --short 1000

Fields of wrong types and values, bytes that are no JSON or no UTF-8, deep nesting, bodies over the limit,
wrong routes and methods, half a request, and clients that go in the middle of an answer, eight at a time.
Every answer must be one that OpenAI's server may give (200, 400, 404, 405, 413, 422), in its shape; a prompt
that is asked again and again in between must always be answered with the same text; at the end every place is
free, the log holds no traceback, and the memory is what it was. Then short requests: what the last hundred
hold against the first.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import string
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from statistics import fmean, median
from typing import Any

import httpx2 as httpx
from own_server import OwnServer, own_server

ALLOWED = {200, 400, 404, 405, 413, 422}
CONTROL = {"prompt": "The capital of France is", "max_tokens": 12, "temperature": 0.8, "seed": 1}
MESSAGES = [{"role": "user", "content": "Say yes."}]
DEEP: Any = [1]
for _ in range(60):
    DEEP = [DEEP]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**64, 10**400, 0.5, -0.0, 1e308, "", "a", "é" * 50, "\ud800",
    "\0", [], ["a"], [1], [[1], [2]], [[]], [-1], [2**70], {}, {"a": 1}, DEEP, MESSAGES, [{"role": "user"}],
    [{}], [{"role": "cat", "content": "a"}], [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], {"include_usage": 1},
    {"include_usage": True}, {"drafting": False}, {"mark": True}, {"mark": "yes"}, ["a"] * 40, [""],
]  # fmt: skip
FIELDS = [
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "n", "seed", "stop", "temperature",
    "top_p", "top_k", "stream", "stream_options", "ignore_eos", "logprobs", "top_logprobs", "echo",
    "min_tokens", "coral", "user", "tools", "response_format", "logit_bias", "min_p", "tokens", "x", "",
]  # fmt: skip
ROUTES = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
OTHERS = [
    "/",
    "/v1",
    "/v1/models",
    "/v1/completions/../x",
    "/nowhere",
    "/health",
    "/metrics",
    "/v1/completions",
]
NOISE = [b"\xff", b"\xc3", b"\xed\xa0\x80", b"{", b"", b"\x00", b'"', b"NaN", string.printable.encode()]


@dataclass(frozen=True)
class Shot:
    """A request: how it is made ("fields", "bytes", "deep", "huge", "route", "half", "gone"), and of what."""

    kind: str
    method: str
    path: str
    body: bytes


def shots(seed: int) -> Iterator[Shot]:
    """Requests without end, the same for the same seed."""
    draw = random.Random(seed)
    kinds = {"fields": 10, "bytes": 4, "deep": 1, "huge": 1, "route": 1, "half": 1, "gone": 2}
    while True:
        (kind,) = draw.choices([*kinds], [*kinds.values()])
        path = draw.choice(ROUTES)
        good: dict[str, Any] = {"messages": MESSAGES} if "chat" in path else {"prompt": "the"}
        good |= {"tokens": [1, 2]} if path == "/detokenize" else {"max_tokens": 2} if "v1" in path else {}
        if path == "/detokenize":
            del good["prompt"]
        body = good | {name: draw.choice(VALUES) for name in draw.sample(FIELDS, draw.randrange(4))}
        content = json.dumps(body).encode()
        if kind == "bytes":
            place = draw.randrange(len(content))
            content = content[:place] + draw.choice(NOISE) + content[place + draw.randrange(3) :]
        elif kind == "deep":
            content = draw.choice([b"[", b'{"a":', b'{"prompt":[']) * draw.randrange(100, 20_000)
        elif kind == "huge":
            content = json.dumps(good | {"prompt": "a" * draw.randrange(2**20, 2**21)}).encode()
        elif kind == "route":
            method = draw.choice(["GET", "PUT", "DELETE", "OPTIONS", "PATCH"])
            yield Shot(kind, method, draw.choice(OTHERS), b"")
            continue
        elif kind == "gone":
            path = draw.choice(ROUTES[:2])
            good = {"messages": MESSAGES} if "chat" in path else {"prompt": "the"}
            more = {
                "max_tokens": 400,
                "ignore_eos": True,
                "n": draw.choice([1, 2]),
                "stream": draw.random() < 0.6,
            }
            content = json.dumps(good | more).encode()
        yield Shot(kind, "POST", path, content)


def fire(shot: Shot, client: httpx.Client, port: int, patience: float = 0.3) -> str:
    """Make a request; its status, "gone" where the answer was not waited for, or what is wrong."""
    if shot.kind in ("half", "gone"):
        return _leave(shot, port, patience)
    try:
        answer = client.request(shot.method, shot.path, content=shot.body)
    except httpx.ReadTimeout:
        return "gone"  # a long text, which nobody bounded; the client goes, as clients do
    if answer.status_code not in ALLOWED:
        return f"status {answer.status_code}: {answer.text[:300]}"
    if answer.status_code != 200 and {*answer.json()["error"]} != {"message", "type", "param", "code"}:
        return f"not OpenAI's shape: {answer.text[:300]}"
    return "traceback" if "Traceback" in answer.text else str(answer.status_code)


def _leave(shot: Shot, port: int, patience: float) -> str:
    """Send half of a request, or all of it, read a little and go."""
    body = shot.body[: len(shot.body) // 2] if shot.kind == "half" else shot.body
    head = f"POST {shot.path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(shot.body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.settimeout(patience)
        connection.sendall(head.encode() + body)
        with suppress(TimeoutError):
            connection.recv(300)
    return "gone"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--short", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with own_server("--queue", 200, "--max-tokens", 32) as server:
        faults = [*fuzz(server, options.requests, options.seed), *short(server, options.short)]
    print(*faults or ["nothing broke"], sep="\n")
    return 1 if faults else 0


def fuzz(server: OwnServer, count: int, seed: int) -> list[str]:
    """Fire, eight at a time; what went wrong."""
    faults, counts, held = list[str](), Counter[str](), list[float]()
    with httpx.Client(base_url=server.url, timeout=10) as client, ThreadPoolExecutor(8) as pool:
        first = _control(client)
        coming = shots(seed)
        for number in range(0, count, 100):
            batch = [*islice(coming, min(100, count - number))]
            control = pool.submit(_control, client)
            for shot, said in zip(
                batch, pool.map(lambda s: fire(s, client, server.port), batch), strict=True
            ):
                counts[f"{shot.kind} {said}" if said.isdigit() or said == "gone" else "WRONG"] += 1
                if not (said.isdigit() or said == "gone"):
                    faults.append(f"{shot.kind} {shot.path} {shot.body[:300]!r}: {said}")
            if control.result() != first:
                faults.append(f"the control's text changed: {control.result()!r}, not {first!r}")
            held.append(server.memory / 2**20)
    if not server.is_idle(10):
        faults.append("places are still taken 10 s after the last request")
    if "Traceback" in (log := server.log.read_text(errors="replace")):
        faults.append(log[log.index("Traceback") :][:5000][-1500:])
    grown = median(held[-len(held) // 4 :]) - median(held[len(held) // 2 : -len(held) // 4] or held)
    print(f"{sum(counts.values())} requests, seed {seed}; MiB every hundred:", *(f"{m:.0f}" for m in held))
    print(*(f"  {count:5} {what}" for what, count in sorted(counts.items())), sep="\n", flush=True)
    return faults + ([f"the last quarter held {grown:.0f} MiB more than the third"] if grown > 32 else [])


def _control(client: httpx.Client) -> str:
    return str(client.post("/v1/completions", json=CONTROL, timeout=120).json()["choices"][0]["text"])


def short(server: OwnServer, count: int) -> list[str]:
    """Short requests one after the other; the memory of the last hundred against that of the first."""
    held = []
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for number in range(count):
            prompt = f"Number {number} is"
            client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4}).raise_for_status()
            held.append(server.memory / 2**20)
    if count < 200:
        return []
    grown = fmean(held[-100:]) - fmean(held[:100])
    print(f"{count} short requests: {grown:+.2f} MiB from the first hundred to the last, of {held[0]:.0f}")
    return [f"short requests left {grown:.1f} MiB"] if grown > 8 else []


if __name__ == "__main__":
    sys.exit(main())
