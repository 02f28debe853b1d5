"""Does the openai client, and curl, work with the server? SmolLM2 on loopback.

    pip install openai    # which make install brings; and curl
    python checks/openai_check.py

Sync, async and streaming, with log-probabilities and usage, 1 and 32 at once: greedy text must be that of
`coral.load().generate`, a stream must join to the text of the whole answer, and a seed give the same text.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

import openai
from own_server import OwnServer, own_server

import coral

QUESTION = "Name three uses of corals."
TOKENS = 48


def asked(number: int = 0) -> dict[str, Any]:
    content = QUESTION if number == 0 else f"{QUESTION} Begin with number {number}."
    return {"messages": [{"role": "user", "content": content}], "max_tokens": TOKENS, "temperature": 0}


def main() -> int:
    llm = coral.load()
    with own_server() as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        model = client.models.list().data[0].id
        expected = [llm.generate(asked(i)["messages"], max_new_tokens=TOKENS) for i in range(32)]
        found = {
            "greedy text is generate's": whole(client, model) == expected[0],
            "a stream joins to it": streamed(client, model) == expected[0],
            "a seed gives the same text": len({sampled(client, model) for _ in range(3)}) == 1,
            "log-probabilities are the text's": scored(client, model, expected[0]),
            "32 at once are what they are alone": asyncio.run(at_once(server, model)) == expected,
            "curl -N streams it": curled(server, model) == expected[0],
        }
    print(*(f"{'ok  ' if good else 'FAIL'} {what}" for what, good in found.items()), sep="\n")
    return 0 if all(found.values()) else 1


def whole(client: openai.OpenAI, model: str) -> str | None:
    return client.chat.completions.create(model=model, **asked()).choices[0].message.content


def sampled(client: openai.OpenAI, model: str) -> str | None:
    chat = client.chat.completions.create(model=model, **asked() | {"temperature": 1, "seed": 5})
    return chat.choices[0].message.content


def streamed(client: openai.OpenAI, model: str) -> str:
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = [*client.chat.completions.create(model=model, **asked(), **options)]
    assert chunks[-1].usage.completion_tokens <= TOKENS and not chunks[-1].choices
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])


def scored(client: openai.OpenAI, model: str, text: str) -> bool:
    """Whether the tokens join to the text, and greedy ones are the likeliest."""
    chat = client.chat.completions.create(model=model, **asked(), logprobs=True, top_logprobs=2)
    content = chat.choices[0].logprobs.content
    said = b"".join(bytes(each.bytes) for each in content).decode()
    best = all(each.logprob == each.top_logprobs[0].logprob for each in content)
    return said.startswith(text) and best and len(content) == chat.usage.completion_tokens


async def at_once(server: OwnServer, model: str) -> list[str | None]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        asking = [client.chat.completions.create(model=model, **asked(i)) for i in range(32)]
        return [chat.choices[0].message.content for chat in await asyncio.gather(*asking)]


def curled(server: OwnServer, model: str) -> str:
    body = json.dumps({"model": model, "stream": True, **asked()})
    command = ["curl", "-sN", f"{server.url}/v1/chat/completions", "-d", body]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    *events, done, _ = said.split("\n\n")
    assert done == "data: [DONE]"
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    return "".join(delta.get("content", "") for delta in deltas)


if __name__ == "__main__":
    sys.exit(main())
