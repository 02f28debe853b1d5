"""Does `coral data regenerate --endpoint` work with our own server? SmolLM2 on loopback.

    python checks/own_regenerate_check.py

Conversations of MT-bench are answered over HTTP and by the same model in this process, greedily and with a
temperature. Greedy answers must be equal, every conversation must be accounted for, and the server idle at
the end.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from own_server import own_server
from regenerate_check import account, check, conversations, lines, regenerate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, own_server("--dtype", "bfloat16") as server:
        place = Path(name)
        source = conversations(place / "prompts.jsonl", options.records)
        warm, greedy, local = (place / f"{each}.jsonl" for each in ("warm", "greedy", "local"))
        url = ["--endpoint", f"{server.url}/v1", "--concurrency", 16, "--max-new-tokens", options.tokens]
        regenerate(source, greedy, *url, "--temperature", 0)
        regenerate(source, warm, *url, "--temperature", 0.8)
        counts = [account(output) for output in (greedy, warm)]
        count = len(lines(source))
        ok = check(greedy, counts[0], count) and check(warm, counts[1], count)
        alike = ["--dtype", "bfloat16", "--max-new-tokens", options.tokens, "--temperature", 0]
        regenerate(source, local, *alike)
        here, there = ({r["source"]: r["messages"] for r in lines(output)} for output in (local, greedy))
        equal = sum(here[each] == there.get(each) for each in here)
        idle = server.is_idle(5)
    print(
        f"{counts[0]['written']} + {counts[1]['written']} written; {equal} of {len(here)} greedy ones equal"
    )
    good = ok and idle and equal == len(here) == counts[0]["written"] == counts[1]["written"]
    print("accounting and answers agree" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
