"""The server with real clients on loopback: what it answers is what `coral.load(...).generate` writes."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import sys
import threading
from collections import Counter
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import fuzz_server
import httpx2 as httpx
import openai
import psutil
import pytest
from running import QUESTION, Server, until
from tiny_tokenizer import tiny_tokenizer

import coral as library
from coral.api import LLM
from coral.serving.answer import Text
from coral.serving.http import Limits
from coral.serving.openai import Refused, read_chat


def test_greedy_text_is_that_of_generate(server: Server, llm: LLM) -> None:
    """Stops a template, an end or a limit that the server has and the library has not."""
    client = server.client()
    chat = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0, max_tokens=16)
    (choice,) = chat.choices
    assert choice.message.content == llm.generate(QUESTION, max_new_tokens=16)
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert chat.usage.prompt_tokens == len(llm.encode(QUESTION)) and chat.usage.completion_tokens == 16
    raw = client.completions.create(model="tiny", prompt=["the an", "in the"], temperature=0, max_tokens=9)
    alone = [llm.generate(prompt, chat=False, max_new_tokens=9) for prompt in ("the an", "in the")]
    assert [c.text for c in raw.choices] == alone and [c.index for c in raw.choices] == [0, 1]
    ids = llm.encode("the an", chat=False)
    for prompt in (ids, [ids]):
        again = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=9)
        assert again.choices[0].text == alone[0] and again.usage.prompt_tokens == len(ids)
    assert len(client.completions.create(model="tiny", prompt="the an").choices[0].text) > 0


def test_sampled_text_is_a_function_of_seed_and_choice(server: Server, llm: LLM) -> None:
    """Stops choices that repeat each other, and a seed that is not the library's."""
    asked = {"temperature": 1.0, "top_p": 0.9, "seed": 7}
    chat = server.client().chat.completions.create(
        model="tiny", messages=QUESTION, n=3, max_completion_tokens=12, extra_body={"top_k": 50}, **asked
    )
    expected = [llm.generate(QUESTION, max_new_tokens=12, sequence_id=i, top_k=50, **asked) for i in range(3)]
    assert [choice.message.content for choice in chat.choices] == expected and len({*expected}) == 3


def test_one_seed_is_one_text_and_others_are_others(server: Server) -> None:
    """Stops a seed that is ignored, and answers without one that are all alike."""
    client = server.client()

    def ask(**more: Any) -> str:
        answer = client.completions.create(model="tiny", prompt="the an", max_tokens=12, **more)
        return answer.choices[0].text

    assert len({ask(seed=9) for _ in range(3)}) == 1 == len({ask(seed=-9) for _ in range(2)})
    assert len({ask(seed=seed) for seed in range(4)}) == 4 == len({ask() for _ in range(4)})


def test_usage_is_what_the_tokenizer_counts(server: Server, llm: LLM) -> None:
    """Stops a bill that counts prompts once for each choice, or forgets tokens that show no text."""
    prompts = ["the an", "in the era of an"]
    answer = server.client().completions.create(model="tiny", prompt=prompts, n=3, max_tokens=7, seed=1)
    written = 0
    for i, prompt in enumerate(prompts):
        for j in range(3):
            options = {"seed": 1, "temperature": 1.0, "sequence_id": 3 * i + j, "max_new_tokens": 7}
            written += sum(len(cycle.tokens) for cycle in llm.stream(prompt, chat=False, **options))
    usage, counts = answer.usage, [len(llm.encode(prompt, chat=False)) for prompt in prompts]
    assert (usage.prompt_tokens, usage.completion_tokens) == (sum(counts), written)
    assert usage.total_tokens == sum(counts) + written


@pytest.mark.parametrize("usage", [True, False])
def test_chunks_come_in_the_order_that_clients_expect(server: Server, llm: LLM, usage: bool) -> None:
    """Stops a stream without a role, a reason, the usage that was asked for, or an end."""
    options = {"stream_options": {"include_usage": True}} if usage else {}
    body = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 12, "stream": True}
    answer = httpx.post(f"{server.address}/v1/chat/completions", json=body | options, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    last = chunks.pop() if usage else None
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[1:-1]]
    assert "".join(delta["content"] for delta in deltas) == llm.generate(QUESTION, max_new_tokens=12)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"] and chunks[-1]["choices"][0]["delta"] == {}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [("usage" in chunk, chunk.get("usage")) for chunk in chunks] == [(usage, None)] * len(chunks)
    if last:
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 12
        drafting = last["metrics"]["speculative_decoding"]
        assert drafting["num_draft_tokens"] >= drafting["num_accepted_draft_tokens"] >= 0


def test_usage_may_come_with_every_chunk(server: Server) -> None:
    """Stops guidellm and vLLM's bench, which count tokens by it."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = server.client().completions.create(
        model="tiny", prompt="the an", stream=True, stream_options=options, max_tokens=10, temperature=0
    )
    counts = [chunk.usage.completion_tokens for chunk in stream]
    assert counts == sorted(counts) and counts[0] < counts[-1] == 10 and counts[-2:] == [10, 10]


def test_openai_client_streams(server: Server, llm: LLM) -> None:
    """Stops chunks that the most used client cannot read."""
    stream = server.client().completions.create(
        model="tiny", prompt="the an", n=2, stream=True, temperature=1, seed=3, max_tokens=10
    )
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    options = {"chat": False, "temperature": 1, "seed": 3, "max_new_tokens": 10}
    assert texts == [llm.generate("the an", sequence_id=i, **options) for i in range(2)]


def test_thirty_two_at_once_are_what_they_are_alone(server: Server, llm: LLM) -> None:
    """Stops texts that change with the load."""

    async def ask(client: openai.AsyncOpenAI, i: int) -> str:
        messages = [{"role": "user", "content": f"the {i} an" * (1 + i % 5)}]
        chat = await client.chat.completions.create(
            model="tiny", messages=messages, seed=i, temperature=i % 3 / 2, max_tokens=6 + i % 16
        )
        return chat.choices[0].message.content

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, i) for i in range(32)))

    written = asyncio.run(ask_all())
    assert written == [
        llm.generate(f"the {i} an" * (1 + i % 5), seed=i, temperature=i % 3 / 2, max_new_tokens=6 + i % 16)
        for i in range(32)
    ]
    until(lambda: server.is_idle)


def test_a_stop_string_across_a_border_is_never_shown(server: Server, llm: LLM) -> None:
    """Stops half of a stop string in a chunk, and text behind it."""
    whole = llm.generate(QUESTION, max_new_tokens=24, seed=5, temperature=1.0)
    for start in range(2, 14, 3):
        stop = whole[start : start + 4]
        stream = server.client().chat.completions.create(
            model="tiny", messages=QUESTION, stream=True, stop=[stop, "never"], max_tokens=24, seed=5
        )
        chunks = [chunk.choices[0] for chunk in stream]
        assert "".join(chunk.delta.content or "" for chunk in chunks) == whole[: whole.index(stop)]
        assert chunks[-1].finish_reason == "stop"


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    """Stops a piece that the next token turns into a stop string, and one that is held for ever."""
    tokenizer = tiny_tokenizer()
    draw = random.Random(0)
    for _ in range(200):
        said = "".join(draw.choice("abé") for _ in range(12))
        stop = ["".join(draw.choice("abé") for _ in range(draw.randrange(1, 4))) for _ in range(2)]
        ids = tokenizer(said, add_special_tokens=False).input_ids
        ends = (n for n in range(len(ids)) if any(s in tokenizer.decode(ids[:n]) for s in stop))
        ids = ids[: next(ends, len(ids))]  # as a state does
        said = tokenizer.decode(ids)
        text, shown = Text(tokenizer, stop), ""
        while ids:
            count = draw.randrange(1, 4)
            now, ids = ids[:count], ids[count:]
            cycle = library.Cycle(now, 0, 0, 0, 0, False)
            shown += text.push(cycle, "" if ids else "length").text
            assert not any(string in shown for string in stop)
        assert shown == said[: min([said.find(s) for s in stop if s in said], default=len(said))]


def test_a_client_that_goes_frees_its_place(slow: LLM) -> None:
    """Stops texts that are written for nobody until their end."""
    body = {"model": "tiny", "prompt": "the", "max_tokens": 480, "ignore_eos": True, "n": 4}
    with Server(lambda: slow) as server:
        url = f"{server.ready().address}/v1/completions"
        with httpx.stream("POST", url, json=body | {"stream": True}, timeout=60) as answer:
            lines = answer.iter_lines()  # which closes the answer when it is dropped
            next(lines)
            assert server.http.open == 4
        until(lambda: server.is_idle)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=0.3)
        until(lambda: server.is_idle)
        assert not server.worker.engine._kept  # none was written to its end


def test_a_place_is_free_within_a_cycle(slow: LLM) -> None:
    """Stops a text that goes on for more than the cycle that runs when its client's leaving is noticed."""
    body = {"prompt": "the", "max_tokens": 480, "ignore_eos": True, "stream": True}
    with Server(lambda: slow) as server:
        url = f"{server.ready().address}/v1/completions"
        noticed, engine = [], server.worker.engine
        cancel, steps = server.worker.cancel, [0]
        step = engine.step
        engine.step = lambda: (steps.__setitem__(0, steps[0] + 1), step())[1]
        server.worker.cancel = lambda states: (noticed.append(steps[0]), cancel(states))[1]
        with httpx.stream("POST", url, json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
        until(lambda: server.is_idle)
        assert steps[0] <= noticed[0] + 1


def test_a_full_queue_says_when_to_come_again(slow: LLM) -> None:
    """Stops a server that takes on more than it can hold, and one that stays full."""
    with Server(lambda: slow, limits=Limits(queue=1), at_once=1) as server:
        url = f"{server.ready().address}/v1/completions"
        body = {"prompt": "the", "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 2}
        with httpx.stream("POST", url, json=body, timeout=60) as first:
            lines = first.iter_lines()
            next(lines)
            full = httpx.post(url, json={"prompt": "the"})
            assert full.status_code == 429 and full.headers["retry-after"] == "1"
            assert full.json()["error"]["type"] == "rate_limit_error"
            assert "coral:num_requests_waiting" in httpx.get(f"{server.address}/metrics").text
        until(lambda: server.is_idle)
        assert httpx.post(url, json={"prompt": "the"}, timeout=60).status_code == 200
        assert httpx.post(url, json={"prompt": "the", "n": 3}).status_code == 400


def test_until_the_model_is_there_the_server_says_so(llm: LLM) -> None:
    """Stops a load balancer that sends requests to a server that has no model yet."""
    go_on = threading.Event()
    with Server(lambda: (go_on.wait(60), llm)[1]) as server:
        for path in ("/health", "/v1/models"):
            assert httpx.get(server.address + path).status_code == 503
        assert httpx.post(f"{server.address}/v1/completions", json={"prompt": "a"}).status_code == 503
        assert httpx.get(f"{server.address}/version").status_code == 200
        go_on.set()
        server.ready()
        assert httpx.get(f"{server.address}/health").status_code == 200


def test_shutting_down_writes_what_was_begun(slow: LLM) -> None:
    """Stops answers that a new deployment cuts."""
    with Server(lambda: slow) as server:
        server.ready()
        body = {"prompt": "the", "max_tokens": 100, "ignore_eos": True, "stream": True, "temperature": 0}
        with httpx.stream("POST", f"{server.address}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.uvicorn.should_exit = True
            rest = [*lines]
    assert '"finish_reason": "length"' in rest[-4] and rest[-2] == "data: [DONE]"
    assert not server.worker._thread.is_alive()


def test_only_keys_open_the_model(llm: LLM) -> None:
    """Stops a route that forgets the key."""
    with Server(lambda: llm, keys=("first", "second")) as server:
        client = server.ready().client()
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            answer = httpx.post(server.address + path, json={}, headers={"Authorization": "Bearer firs"})
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        for key in ("first", "second"):
            assert [m.id for m in client.with_options(api_key=key).models.list()] == ["tiny"]
        assert httpx.get(f"{server.address}/health").status_code == 200


def test_facts(server: Server, llm: LLM) -> None:
    """Stops counters that differ from what was written, and ids that are not the tokenizer's."""
    before = httpx.get(f"{server.address}/metrics").text
    server.client().completions.create(model="tiny", prompt="the an", max_tokens=20, temperature=0)
    after = httpx.get(f"{server.address}/metrics").text

    def value(text: str, name: str) -> float:
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    name = "coral:generation_tokens_total"
    assert value(after, name) - value(before, name) == 20
    assert value(after, "coral:spec_decode_num_draft_tokens_total") > 0
    ids = httpx.post(f"{server.address}/tokenize", json={"prompt": "the an"}).json()
    assert ids["tokens"] == llm.encode("the an", chat=False) and ids["count"] == len(ids["tokens"])
    chat = httpx.post(f"{server.address}/tokenize", json={"messages": QUESTION}).json()["tokens"]
    assert chat == llm.encode(QUESTION)
    text = httpx.post(f"{server.address}/detokenize", json={"tokens": ids["tokens"][1:]}).json()
    assert text == {"prompt": "the an"}


def test_the_page_needs_nothing_from_elsewhere(server: Server) -> None:
    """Stops a page that is blank offline, that others may frame, or whose fields no screen reader can name.
    checks/page_check.py uses it in a browser.
    """
    answer = httpx.get(f"{server.address}/")
    page = answer.text
    assert answer.headers["content-type"].startswith("text/html")
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|https?://|@import|innerHTML""", page)
    for field in re.findall(r"<(?:input|textarea)[^>]*>", page):
        name = re.search(r'id="(\w+)"', field)
        within = "</label>" not in page[: page.index(field)].rpartition("<label")[2]
        assert within or (name and f'for="{name[1]}"' in page)
    assert (
        '<html lang="en">' in page and "width=device-width" in page and "prefers-color-scheme: dark" in page
    )


BAD: dict[str, tuple[Any, int]] = {
    "no object": ([], 400),
    "nothing": ({}, 400),
    "no model of ours": ({"prompt": "a", "model": "gpt"}, 404),
    "no tokens": ({"prompt": "a", "max_tokens": 0}, 400),
    "fewer": ({"prompt": "a", "max_tokens": -1}, 400),
    "a number as text": ({"prompt": "a", "max_tokens": "7"}, 400),
    "true as number": ({"prompt": "a", "max_tokens": True}, 400),
    "empty": ({"prompt": ""}, 400),
    "empty list": ({"prompt": []}, 400),
    "empty ids": ({"prompt": [[]]}, 400),
    "mixed": ({"prompt": [1, "a"]}, 400),
    "too long": ({"prompt": "a" * 2000}, 400),
    "id out of range": ({"prompt": [999_999]}, 400),
    "negative id": ({"prompt": [-1]}, 400),
    "id beyond 64 bits": ({"prompt": [2**70]}, 400),
    "unknown": ({"prompt": "a", "colour": "red"}, 400),
    "half a character": ({"prompt": "\ud800"}, 400),
    "half a character in a name": ({"prompt": "a", "\ud800": 1}, 400),
    "hot": ({"prompt": "a", "temperature": -1}, 400),
    "top_p": ({"prompt": "a", "top_p": 0}, 400),
    "tiny temperature": ({"prompt": "a", "temperature": 1e-40}, 400),
    "empty stop": ({"prompt": "a", "stop": ""}, 400),
    "many logprobs": ({"prompt": "a", "logprobs": 21}, 400),
    "logprobs of a chat": ({"prompt": "a", "logprobs": True}, 400),
    "more than may be written": ({"prompt": "a", "min_tokens": 17}, 400),
    "scored many times": ({"prompt": "a", "echo": True, "logprobs": 1, "n": 2}, 400),
    "echo as text": ({"prompt": "a", "echo": "yes"}, 400),
    "ours unknown": ({"prompt": "a", "coral": {"speed": 2}}, 400),
    "bias": ({"prompt": "a", "logit_bias": {"1": 2}}, 400),
    "penalty": ({"prompt": "a", "presence_penalty": 0.5}, 400),
    "tools": ({"prompt": "a", "tools": [{}]}, 400),
    "format": ({"prompt": "a", "response_format": {"type": "json_object"}}, 400),
    "many": ({"prompt": "a", "n": 129}, 400),
    "huge": ({"prompt": "a" * 30_000}, 413),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_refused_as_openai_does(server: Server, name: str) -> None:
    """Stops a traceback, a field that is ignored, and a server that is stuck behind a bad request."""
    body, status = BAD[name]
    answer = httpx.post(f"{server.address}/v1/completions", content=json.dumps(body))
    assert answer.status_code == status, answer.text
    assert {*answer.json()["error"]} == {"message", "type", "param", "code"} and server.is_idle


class Heard(logging.Handler):
    """The tracebacks of what the server logs, which hands none of it on to others."""

    def __init__(self) -> None:
        super().__init__()
        self.tracebacks: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.tracebacks.append(self.format(record))


def test_fuzzed_requests_leave_nothing_behind(server: Server) -> None:
    """Stops any request that ends in a traceback, a wrong status or a place that is kept;
    checks/fuzz_server.py fires thousands at SmolLM2.
    """
    heard, port, statuses = Heard(), int(server.address.rpartition(":")[2]), Counter[str]()
    logging.getLogger("uvicorn").addHandler(heard)
    with httpx.Client(base_url=server.address, timeout=60) as client:
        for shot in islice(fuzz_server.shots(1), 200):
            said = fuzz_server.fire(shot, client, port, patience=0.02)
            assert said.isdigit() or said == "gone", (shot, said)
            statuses[said] += 1
    until(lambda: server.is_idle)
    logging.getLogger("uvicorn").removeHandler(heard)
    assert not heard.tracebacks
    assert {"200", "400", "404", "405", "413", "gone"} == {*statuses}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="another system counts memory otherwise")
def test_a_thousand_requests_leave_no_memory_behind(server: Server) -> None:
    """Stops what is kept of each request: the last hundred hold what the first did."""
    held, process = [], psutil.Process()
    with httpx.Client(base_url=server.address, timeout=60) as client:
        for number in range(1100):
            body = {"prompt": f"the {number}", "max_tokens": 2, "logprobs": 1, "n": 1 + number % 2}
            client.post("/v1/completions", json=body).raise_for_status()
            held.append(process.memory_info().rss / 2**20)
    until(lambda: server.is_idle)
    assert fmean(held[-100:]) - fmean(held[100:200]) < 4


def test_an_answer_may_be_sent_back_as_clients_do() -> None:
    """Stops a conversation that ends with its second turn, and parts of a message that are not text."""
    said = {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None, "annotations": []}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    more = {"role": "developer", "content": parts}
    asked = read_chat({"messages": [said, more], "temperature": None, "user": "me"}, 9)
    assert asked.prompts == [[{"role": "assistant", "content": "yes"}, {"role": "system", "content": "ab"}]]
    assert asked.options["max_new_tokens"] == 9
    with pytest.raises(Refused, match="messages"):
        read_chat({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 9)


def test_regenerate_takes_its_answers_from_here(coral, server: Server, llm: LLM, tmp_path: Path) -> None:
    """Stops answers that our own client cannot read, or that are not the target's."""
    source, output = tmp_path / "source.jsonl", tmp_path / "output.jsonl"
    turns = [{"role": role, "content": "an"} for role in ("user", "assistant", "user", "assistant")]
    records = [
        {"messages": [{"role": "system", "content": f"the {i}"}, *turns[: 2 + i % 3]]} for i in range(9)
    ]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    command = ("data", "regenerate", source, "--output", output, "--endpoint", f"{server.address}/v1")
    result = coral(*command, "--max-new-tokens", 6, "--temperature", 0)
    assert result.code == 0 and "9 records = 9 written + 0 skipped + 0 failed" in result.out, result.err
    for line in output.read_text().splitlines():
        messages = json.loads(line)["messages"]
        for end in range(2, len(messages), 2):
            text = llm.generate(messages[:end], max_new_tokens=6)
            assert messages[end]["content"] == text.rstrip("\ufffd")  # of a character that is cut
    until(lambda: server.is_idle)


def test_serve_without_its_extra_says_how_to_get_it(coral, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops an import error where a sentence would do."""
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    result = coral("serve", "--target", "nowhere")
    assert result.code == 2 and "pip install 'coral-drafter[serve]'" in result.err


def test_serve_ends_where_the_model_cannot_be_loaded(coral, tmp_path: Path) -> None:
    """Stops a server that answers 503 for ever."""
    result = coral("serve", "--target", tmp_path / "nothing", "--port", 0)
    assert result.code == 2 and "nothing" in result.err and "Traceback" not in result.err
