"""Log-probabilities, echoes and least lengths: truthful numbers, beside a text that they do not change."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import pytest
import torch
from running import QUESTION, Server
from torch import Tensor

from coral.api import LLM
from coral.decoding.plain import Plain
from coral.serving.token_names import Names
from coral.tree import TreeSize

PROMPT = "the an in era"


def log_softmax(llm: LLM, tokens: list[int]) -> Tensor:
    """[n, V] by transformers' code: of what may stand behind each token."""
    with torch.inference_mode():
        return llm.target.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


def written(llm: LLM, prompt: Any, **options: Any) -> tuple[list[int], list[int]]:
    """Ids of a prompt, and those that the library writes behind it."""
    state = llm.start(prompt, **options)
    for _ in llm.cycles(state):
        pass
    return state.tokens[: state.prompt_length], state.written


def post(server: Server, route: str, **body: Any) -> Any:
    answer = httpx.post(f"{server.address}/v1/{route}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("temperature", [0, 1.3])
def test_chat_tells_the_targets_log_softmax(server: Server, llm: LLM, temperature: float) -> None:
    """Stops log-probabilities of the drafter, of another position, or after temperature and top-k."""
    options = {"temperature": temperature, "seed": 4, "top_k": 9}
    prompt, answer = written(llm, QUESTION, max_new_tokens=12, **options)
    expected = log_softmax(llm, prompt + answer)[len(prompt) - 1 : -1]
    client, names = server.client(), Names(llm.tokenizer)
    asked: Any = {"model": "tiny", "messages": QUESTION, "max_tokens": 12, "seed": 4}
    asked["temperature"] = temperature
    more = {"extra_body": {"top_k": 9}}
    chat = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, **more)
    without = client.chat.completions.create(**asked, **more).choices[0]
    (choice,) = chat.choices
    assert choice.message == without.message and without.logprobs is None
    content = choice.logprobs.content
    assert [each.token for each in content] == [*map(names, answer)]
    assert chat.usage.completion_tokens == len(content) == 12
    for row, token, each in zip(expected, answer, content, strict=True):
        assert each.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert each.bytes is None or bytes(each.bytes).decode("utf-8", "replace") == each.token
        best = row.topk(3).values.tolist()
        assert [top.logprob for top in each.top_logprobs] == pytest.approx(best, abs=1e-4)
        if temperature == 0:
            assert each.logprob == each.top_logprobs[0].logprob
    stream = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True, **more)
    chunks = [chunk.choices[0] for chunk in stream]
    assert [each for chunk in chunks if chunk.logprobs for each in chunk.logprobs.content] == content
    assert "".join(chunk.delta.content or "" for chunk in chunks) == choice.message.content


@pytest.mark.parametrize("as_ids", [False, True])
def test_an_echo_scores_the_prompt(server: Server, llm: LLM, as_ids: bool) -> None:
    """Stops a prompt whose tokens are scored by the row beside, and offsets that do not point at tokens."""
    prompt, answer = written(llm, PROMPT, chat=False, max_new_tokens=5)
    given = prompt if as_ids else PROMPT
    asked = {"prompt": given, "temperature": 0, "max_tokens": 5}
    plain = post(server, "completions", **asked)["choices"][0]
    (choice,) = post(server, "completions", **asked, echo=True, logprobs=2)["choices"]
    assert choice["text"] == PROMPT + plain["text"]
    assert post(server, "completions", **asked, echo=True)["choices"][0]["text"] == choice["text"]
    found, tokens = choice["logprobs"], prompt + answer
    names, rows = Names(llm.tokenizer), log_softmax(llm, tokens)
    assert found["tokens"] == [*map(names.unique, tokens)]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    for row, token, log_prob, top in zip(
        rows, tokens[1:], found["token_logprobs"][1:], found["top_logprobs"][1:], strict=False
    ):
        assert log_prob == pytest.approx(float(row[token]), abs=1e-4)
        assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-4)
        assert top[names.unique(token)] == log_prob and 2 <= len(top) <= 3
    for place, token in zip(found["text_offset"], tokens, strict=True):
        if token not in llm.tokenizer.all_special_ids and "\ufffd" not in names(token):
            assert choice["text"][place:].startswith(names(token))
    url, body = f"{server.address}/v1/completions", {**asked, "echo": True, "logprobs": 2, "stream": True}
    lines = httpx.post(url, json=body, timeout=60).text.split("\n\n")[:-2]
    chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    for name, whole in found.items():
        assert [each for chunk in chunks if chunk["logprobs"] for each in chunk["logprobs"][name]] == whole
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_what_loglikelihood_tasks_ask_for(server: Server, llm: LLM) -> None:
    """Stops lm_eval: several prompts of ids, one token, and a greedy flag by the equality of two numbers."""
    prompts = [llm.encode(text, chat=False) for text in (PROMPT, "in", PROMPT + " an the" * 40)]
    answer = post(server, "completions", prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0)
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        found = choice["logprobs"]
        assert len(found["tokens"]) == len(prompt) + 1
        assert found["token_logprobs"][-1] == max(found["top_logprobs"][-1].values())


def test_log_probs_are_those_of_alone(server: Server, llm: LLM) -> None:
    """Stops numbers, or a text, that change with what is beside: a reused prefix hides its rows."""
    asked = {"prompt": PROMPT + " an the" * 20, "max_tokens": 8, "seed": 2, "logprobs": 1, "echo": True}
    alone = post(server, "completions", **asked)["choices"][0]
    several = post(server, "completions", **asked | {"prompt": [asked["prompt"]] * 4})["choices"]
    assert len({choice["text"] for choice in several}) > 1
    for name in ("text_offset", "tokens"):
        assert several[0]["logprobs"][name] == alone["logprobs"][name]
    numbers = [choice["logprobs"]["token_logprobs"][1:] for choice in (several[0], alone)]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-4)  # transformers' code rounds by the batch


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_end_comes_before_the_least_length(llm: LLM, temperature: float) -> None:
    """Stops an end that is masked at other nodes than those of its positions."""
    plain = LLM(llm.target, Plain(), TreeSize(1, 1, 1))
    ended = False
    for seed in range(6):
        texts, ends = [], frozenset(range(0, llm.target.vocab_size, 2))
        for writer in (plain, llm):
            state = writer.start(PROMPT, chat=False, max_new_tokens=30, seed=seed, temperature=temperature)
            free = writer.start(PROMPT, chat=False, max_new_tokens=30, seed=seed, temperature=temperature)
            for each in (state, free):
                each.eos_ids = ends
            state.min_length = state.prompt_length + 11
            for each in (state, free):
                for _ in writer.cycles(each):
                    pass
            texts.append(state.written)
            assert not {*state.written[:11]} & ends
            ended |= len(free.written) < 11
        assert texts[0] == texts[1] and len(texts[0]) >= 11
    assert ended


def test_least_length_over_http(server: Server, llm: LLM) -> None:
    """Stops a stop string that ends a text too soon, and one that is never looked for again."""
    asked: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 24, "seed": 3, "ignore_eos": True}
    whole = post(server, "completions", **asked)["choices"][0]["text"]
    stop = [*dict.fromkeys(whole.replace("\ufffd", ""))][:16]
    for least in (0, 3, 9):
        choice = post(server, "completions", **asked, stop=stop, min_tokens=least, logprobs=0)["choices"][0]
        text, free = choice["text"], choice["logprobs"]["text_offset"][least]
        assert whole.startswith(text) and len(text) >= free and choice["finish_reason"] == "stop"
        assert not any(each in text[free:] for each in stop)


def test_plain_decoding_is_asked_for_by_request(server: Server, llm: LLM) -> None:
    """Stops a switch that changes the text, or does nothing; and marks that are not the text's."""
    asked: dict[str, Any] = {"messages": QUESTION, "max_tokens": 16, "temperature": 0}
    plain = post(server, "chat/completions", **asked, coral={"drafting": False, "mark": True})
    drafted = post(server, "chat/completions", **asked, coral={"mark": True})
    silent = post(server, "chat/completions", **asked)
    assert "coral" not in silent["choices"][0]
    texts = [answer["choices"][0]["message"]["content"] for answer in (plain, drafted, silent)]
    assert texts == [llm.generate(QUESTION, max_new_tokens=16)] * 3
    counts = [answer["metrics"]["speculative_decoding"] for answer in (plain, drafted)]
    assert counts[0]["num_draft_tokens"] == 0 < counts[1]["num_accepted_draft_tokens"]
    mark = drafted["choices"][0]["coral"]
    assert "".join(span["text"] for span in mark["spans"]) == texts[0]
    assert {span["accepted"] for span in mark["spans"]} == {True, False}
    assert mark["tokens"] == 16 > mark["cycles"] and plain["choices"][0]["coral"]["cycles"] == 16


def test_names_join_to_the_text() -> None:
    """Stops tokens that lose the space in front of them, and half characters that look alike."""
    from tiny_tokenizer import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    names, said = Names(tokenizer), "the an é€ in"
    ids = tokenizer(said, add_special_tokens=False).input_ids
    found = [names.bytes(token) for token in ids]
    assert None not in found and b"".join(map(bytes, found)).decode() == said
    assert len({*map(names.unique, ids)}) == len({*ids})
