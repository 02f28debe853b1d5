"""Does guidellm, a load generator, work with the server? SmolLM2 on loopback, synthetic prompts.

    python -m venv .venv-clients && .venv-clients/bin/pip install guidellm 'torch==2.13.0'
    python checks/guidellm_check.py --python .venv-clients/bin/python

It asks for usage with every chunk and for `ignore_eos`, and counts tokens by them: every request must succeed
and have as many tokens as were asked for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from own_server import own_server

import coral

TOKENS = 24


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", type=Path, required=True, help="of the environment that has guidellm")
    parser.add_argument("--requests", type=int, default=24)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, own_server() as server:
        words, report = Path(name) / "words", Path(name) / "report.json"
        coral.load().tokenizer.save_pretrained(words)
        asked = {
            "backend": f"kind=openai_http,target={server.url}",
            "profile": "kind=concurrent,streams=4",
            "constraint": f"kind=max_requests,count={options.requests}",
            "data": f"kind=synthetic_text,prompt_tokens=32,output_tokens={TOKENS}",
            "tokenizer": f"kind=huggingface_auto,model={words}",
            "output": f"kind=json,path={report}",
        }
        command = [options.python.parent / "guidellm", "run", "--disable-console"]
        command += [part for option, value in asked.items() for part in (f"--{option}", value)]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, cwd=name)
        if done.returncode:
            raise SystemExit(f"guidellm ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
        idle = server.is_idle(5)
    good = benchmark["requests"]["successful"]
    whole = sum(request["output_tokens"] == TOKENS for request in good)
    print(f"guidellm: {len(good)} of {options.requests} requests succeeded, {whole} with all {TOKENS} tokens")
    return 0 if idle and whole == len(good) == options.requests else 1


if __name__ == "__main__":
    sys.exit(main())
