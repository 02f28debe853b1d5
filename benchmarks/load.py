"""A server under load: `coral serve` plain and with its drafter, and any other that speaks OpenAI's protocol.

    PYTHONPATH=checks python benchmarks/load.py OUTPUT [--clients 1,4,8,16,32] [--other vLLM=http://HOST:PORT]

So many clients each send a prompt of the suites, read the answer as it streams, and send the next. Plain and
drafted texts are of two processes of one server, asked in turn, so that both meet the same machine and no
prompt finds its keys and values from the other's turn; every text must be the same both ways. Other servers
answer the same requests in the same run; one that caches prompts must be started anew. A chunk may bring
several tokens: each counts as an even share of the wait for it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import sys
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

import httpx2 as httpx
from own_server import own_server

from coral.bench.environment import commit, environment
from coral.suites import prompts as suites

SUITES = "mt_bench,humaneval,gsm8k"


@dataclass
class Cell:
    """What so many clients of a server saw, over all rounds. Seconds; one a request, or one a token."""

    seconds: float = 0.0
    tokens: int = 0
    accepted: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        """Figures of the table; tau is tokens a forward, plain steps included."""
        p50, p95 = _percentiles(self.first)
        b50, b95 = _percentiles(self.between)
        return {
            "requests/s": len(self.first) / self.seconds, "tokens/s": self.tokens / self.seconds,
            "tau": self.tokens / (self.tokens - self.accepted), "first p50": p50, "first p95": p95,
            "between p50": b50, "between p95": b95,
        }  # fmt: skip

    def short(self) -> Cell:
        """Without texts, and to a tenth of a millisecond."""
        first, between = ([round(each, 4) for each in part] for part in (self.first, self.between))
        return replace(self, texts={}, first=first, between=between)


def _percentiles(seconds: list[float]) -> tuple[float, float]:
    cuts = quantiles(seconds, n=20, method="inclusive")
    return cuts[9], cuts[18]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--clients", default="1,4,8,16,32")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer; ends are ignored")
    parser.add_argument(
        "--each", type=int, default=2, help="requests of a client in a round; 8 at least in all"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--other", action="append", default=[], help="NAME=URL of a server that runs")
    parser.add_argument("--only-other", action="store_true", help="leave coral serve out")
    parser.add_argument("--dtype", default="bfloat16")
    options, serve = parser.parse_known_args()
    options.others = servers = dict(other.split("=", 1) for other in options.other)
    before, cells = os.getloadavg()[0], dict[str, dict[int, Cell]]()
    if options.only_other:
        asyncio.run(measure(options, {name: (url, {}) for name, url in servers.items()}, cells))
    else:
        serve = ["--dtype", options.dtype, "--memory-gb", "2", *serve]
        with own_server(*serve) as one, own_server(*serve) as two:
            ours = {"plain": (one.url, {"coral": {"drafting": False}}), "CORAL": (two.url, dict[str, Any]())}
            others = {name: (url, dict[str, Any]()) for name, url in servers.items()}
            asyncio.run(measure(options, {**ours, **others}, cells))
    write(options, cells, before)
    return 0


async def measure(
    options: argparse.Namespace,
    servers: dict[str, tuple[str, dict[str, Any]]],
    cells: dict[str, dict[int, Cell]],
) -> None:
    """Fill `cells` by server and number of clients; servers take turns within a round."""
    both = zip(*suites.load(SUITES).values(), strict=False)
    every = cycle([prompt.turns[0] for prompts in both for prompt in prompts])
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        bodies = {}
        for name, (url, more) in servers.items():
            models = (await client.get(f"{url}/v1/models")).json()
            bodies[name] = {"model": models["data"][0]["id"], "max_tokens": options.tokens, **more}
            await load(client, url, bodies[name], ["Say yes.", "Say no."], 2, Cell())
        for count in map(int, options.clients.split(",")):
            for _ in range(options.rounds):
                prompts = [*islice(every, max(8, options.each * count))]  # new ones, which no cache has
                for name, (url, _) in servers.items():
                    cell = cells.setdefault(name, {}).setdefault(count, Cell())
                    await load(client, url, bodies[name], prompts, count, cell)
            speeds = {name: round(of[count].row()["tokens/s"], 1) for name, of in cells.items()}
            print(count, speeds, flush=True)


async def load(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], prompts: list[str], count: int, cell: Cell
) -> None:
    """Have `count` clients ask all prompts, and add what they see to the cell."""
    coming = iter(enumerate(prompts, len(cell.texts)))

    async def one() -> None:
        for number, prompt in coming:
            await ask(client, url, {**body, "messages": [{"role": "user", "content": prompt}]}, number, cell)

    begin = perf_counter()
    await asyncio.gather(*(one() for _ in range(count)))
    cell.seconds += perf_counter() - begin


async def ask(client: httpx.AsyncClient, url: str, body: dict[str, Any], number: int, cell: Cell) -> None:
    usage = {"include_usage": True, "continuous_usage_stats": True}
    more = {"stream": True, "stream_options": usage, "temperature": 0, "ignore_eos": True}
    begin, last, tokens, text, chunk = perf_counter(), 0.0, 0, "", dict[str, Any]()
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body | more) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk, now = json.loads(line[6:]), perf_counter()
            if "error" in chunk:
                raise SystemExit(f"{url}: {chunk['error']}")
            text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            if (new := (chunk.get("usage") or {}).get("completion_tokens", 0) - tokens) > 0:
                cell.first += [] if tokens else [now - begin]
                cell.between += [(now - last) / new] * new if tokens else []
                last, tokens = now, tokens + new
    cell.tokens += tokens
    drafting = chunk.get("metrics", {}).get("speculative_decoding", {})
    cell.accepted += drafting.get("num_accepted_draft_tokens", 0)
    cell.texts[number] = text


def write(options: argparse.Namespace, cells: dict[str, dict[int, Cell]], before: float) -> None:
    """results.json and results.md; ends with an error if a text of ours depends on drafting."""
    rows = {name: {count: cell.row() for count, cell in of.items()} for name, of in cells.items()}
    options.output.mkdir(parents=True, exist_ok=True)
    counts = [*next(iter(cells.values()))]
    lines = [
        "| clients | server | requests/s | tokens/s | tau | first token, p50 | p95 | between, p50 | p95 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for count in counts:
        for name in cells:
            row = rows[name][count]
            milliseconds = (f"{1000 * row[key]:.0f} ms" for key in [*row][3:])
            figures = [
                f"{row['requests/s']:.2f}",
                f"{row['tokens/s']:.0f}",
                "" if name in options.others else f"{row['tau']:.2f}",  # they do not say
                *milliseconds,
            ]
            lines.append("| " + " | ".join([str(count), name, *figures]) + " |")
    differ = 0
    if {"plain", "CORAL"} <= cells.keys():
        pairs = [(cells["plain"][n].texts, cells["CORAL"][n].texts) for n in counts]
        differ = sum(a[i] != b[i] for a, b in pairs for i in a)
        lines += ["", f"{sum(len(a) for a, _ in pairs) - differ} texts the same both ways, {differ} not."]
    here = environment()
    features = ", ".join(name for name, has in here["cpu_features"].items() if has)
    machine = f"{here['hardware']} ({features}), {here['threads']} threads, torch {here['torch']}"
    facts = (
        f"{machine}; load average {before:.1f} before, {os.getloadavg()[0]:.1f} behind. Prompts of {SUITES}, "
        f"greedy, {options.tokens} tokens each, {options.dtype}. Tau: tokens a forward, plain steps included."
    )
    command = f"`PYTHONPATH=checks python {shlex.join(sys.argv)}` at commit `{commit()}`."
    lines += ["", facts, "", command]
    (options.output / "results.md").write_text("\n".join(lines) + "\n")
    seen = {
        name: {c: asdict(replace(cell, texts={})) for c, cell in of.items()} for name, of in cells.items()
    }
    record = {"rows": rows, "cells": seen}
    (options.output / "results.json").write_text(json.dumps(record))
    print("\n".join(lines))
    if differ:
        raise SystemExit(f"{differ} texts depend on drafting")


if __name__ == "__main__":
    sys.exit(main())
