"""A table people quote: each test names the way in which a number in it could be false."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from coral.bench import methods, suites
from coral.bench.costs import Costs
from coral.bench.recall import recall_by_depth
from coral.bench.report import markdown, report
from coral.bench.rows import acceptance_by_depth, repeated, tau, unrepeated_cycles
from coral.bench.run import bench
from coral.data import prepared
from coral.decoding.proposers.ngram import NGram
from coral.decoding.sampling import Sampling
from coral.decoding.state import Cycle
from coral.decoding.tree import Budget, DraftTree
from coral.errors import CoralError
from coral.target import Target

ROW = {
    "kind", "drafter", "suite", "temperature", "coupled", "dtype", "tokens", "cycles", "seconds",
    "prefill_seconds", "tokens_per_second", "speedup", "speedup_over_hf", "tau", "tau_unrepeated",
    "repeat_share", "acceptance_by_depth", "draft_share", "verify_share", "equal", "near_tie", "wrong",
    "identical", "c", "nodes", "draft_forwards", "v", "ceiling",
}  # fmt: skip


def cycle(tokens: list[int], accepted: int | None = None, depth: int = 3, cut: bool = False) -> Cycle:
    accepted = len(tokens) - 1 if accepted is None else accepted
    return Cycle(tokens, 4, accepted, depth, 2, cut, 0.25, 0.5, 1.0)


def tiny_target() -> Target:
    torch.manual_seed(1)
    words = {chr(97 + i): i for i in range(26)} | {"?": 26, "<eos>": 27}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=28, max_position_embeddings=96,
        initializer_range=0.5, eos_token_id=27,
    )  # fmt: skip
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="?")
    fast.chat_template = (
        "{% for m in messages %}{{ m.content[:6] }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    return Target.load(LlamaForCausalLM(config), tokenizer=fast)


def test_suites_hold_prompts_and_nothing_else() -> None:
    """Stops a truncated suite, and shipping reference answers that a model could be trained or scored on."""
    loaded = suites.load("mt_bench,humaneval,gsm8k")
    assert {name: len(prompts) for name, prompts in loaded.items()} == suites.SUITES
    assert all(len(prompt.turns) == 2 for prompt in loaded["mt_bench"])
    text = repr(loaded)
    assert "canonical_solution" not in text and "def check(" not in text and "####" not in text
    assert loaded["humaneval"][0].turns[0].startswith("Complete the following Python function.")
    assert [len(prompts) for prompts in suites.load(["gsm8k"], limit=3).values()] == [3]


def test_suite_from_a_path(tmp_path: Path) -> None:
    """Stops losing Spec-Bench's ids and reading a broken line as an empty prompt."""
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question_id": 81, "turns": ["a\u2028b", "c"]}\n', encoding="utf-8")
    assert suites.load(str(path)) == {"mine": [suites.Prompt("81", "", ("a\u2028b", "c"))]}
    path.write_text('{"id": 1, "turns": ["a"]}\n{"id": 2}\n', encoding="utf-8")
    with pytest.raises(CoralError, match="line 2"):
        suites.load(str(path))
    with pytest.raises(CoralError, match="mt_bench, humaneval, gsm8k"):
        suites.load("mtbench")


def test_held_out_prompts_of_prepared_data(tmp_path: Path) -> None:
    """Stops a template put around prompts that have one, and prompts of another tokenizer that pass."""
    rows = [
        {"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": "b"}]} for c in "cdefg"
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = tiny_target()
    target.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}a{% endfor %}"
    prepared.prepare([tmp_path / "c.jsonl"], target.tokenizer, tmp_path / "data", held_out=2)
    data = str(tmp_path / "data")
    held_out = prepared.load(data).held_out_prompts
    assert [suites.render(None, prompt) for prompt in suites.load(data)["held_out"]] == held_out
    more, options = tmp_path / "more.jsonl", {"max_new_tokens": 3, "peers": False}
    more.write_text('{"id": 1, "turns": ["ab"]}')
    results = json.loads(bench(target, {}, f"{data},{more}", tmp_path / "out", **options).read_text())
    assert {row["suite"]: row["tokens"] for row in results["rows"]} == {"held_out": 6, "more": 3, "all": 9}
    target.tokenizer.add_tokens(["new"])
    with pytest.raises(CoralError, match="the target's own tokenizer"):
        bench(target, {}, data, tmp_path / "other", **options)
    with pytest.raises(CoralError, match=r"no coral\.json"):
        suites.load(str(tmp_path))
    with pytest.raises(CoralError, match="named twice"):
        suites.load([data, data])


def test_formulas_on_cycles_made_by_hand() -> None:
    """Stops tau as a mean of means, cut cycles in tau, and rates over trees that could not go deeper."""
    cycles = [cycle([1, 2, 3]), cycle([4]), cycle([5, 6], depth=1), cycle([7, 8], accepted=3, cut=True)]
    assert tau(cycles) == 2.0
    assert tau([]) is None
    # depth 1: 3 of 4 reach it; depth 2: two of those trees go deeper, both reach it; depth 3: 1 of 2
    assert acceptance_by_depth(cycles) == [3 / 4, 1.0, 1 / 2]


def test_repetition_is_counted_by_10_grams() -> None:
    """Stops counting the first occurrence, or a 9-gram, as repetition: small targets live on loops."""
    text = list(range(12))
    assert not any(repeated([*text, *text[:9]]))
    assert repeated([*text, *text[:10]]) == [False] * 12 + [True] * 10
    assert sum(repeated([5] * 12)) == 11  # a loop repeats itself from its second token on
    cycles = [cycle(text[:6]), cycle(text[6:]), cycle(text[:9]), cycle(text[9:10])]
    assert unrepeated_cycles(cycles) == cycles[:2]


def test_v_is_relative_to_the_plain_step_used() -> None:
    """Stops a ceiling against one row when plain decoding is the faster padded one."""
    costs = Costs("float32", "padded to 2 rows", {}, 0.5, {1: 1.0, 2: 0.5, 4: 0.9}, {})
    assert (costs.v(2), costs.v(3), costs.v(99)) == (1.0, 1.4, 1.8)


class Chain:
    """Drafts the same id again and again: a drafter that is nearly always wrong."""

    def propose(self, states: list, committed: list, budget: Budget) -> list[DraftTree]:
        chain = torch.tensor([-1, 0, 1])
        return [DraftTree(torch.tensor([s.tokens[-1], 3, 3]), chain, -torch.arange(3.0), 2) for s in states]


DRAFTERS = {"chain": lambda target, coupled: Chain(), "look": lambda target, coupled: NGram(3, 1)}
OPTIONS = {
    "limit": 2, "deepen": 3, "cost_ratio": 0.2, "temperatures": (0.0, 1.0), "coupled": (True, False),
    "max_new_tokens": 14, "note": "Random weights.", "command": "coral bench --suite mt_bench,gsm8k",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("bench")
    return bench(tiny_target(), DRAFTERS, "mt_bench,gsm8k", output, **OPTIONS)


def test_rows(finished: Path) -> None:
    """Stops a missing field, a method that writes more or fewer tokens, and an unequal text that passes."""
    results = json.loads(finished.read_text())
    assert {"environment", "command", "commit", "rows"} <= set(results)
    rows = results["rows"]
    assert all(set(row) == ROW for row in rows)
    # T = 0: plain, 3 peers, 2 drafters; T = 1: each drafter coupled and not; 2 suites and `all`
    assert len(rows) == 3 * (6 + 8)
    assert {row["tokens"] for row in rows if row["suite"] == "mt_bench"} == {2 * 2 * 14}
    assert {row["tokens"] for row in rows if row["suite"] == "all"} == {3 * 2 * 14}
    for row in rows:
        hf_sample = row["drafter"].startswith("hf_") and row["temperature"] > 0
        assert row["identical"] is (None if hf_sample else True) and row["wrong"] == row["near_tie"] == 0
        assert row["equal"] == (0 if hf_sample else row["tokens"] // 14)
    plain = [row for row in rows if row["kind"] == "plain"]
    assert all(row["tau"] == row["speedup"] == row["v"] == row["ceiling"] == 1.0 for row in plain)
    assert all(row["cycles"] == row["tokens"] for row in rows if row["drafter"] in ("plain", "hf_generate"))


def test_resume(finished: Path) -> None:
    """Stops a second measurement of what is finished, a torn line that breaks the file, and mixed benches."""
    log = finished.with_name("records.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-3]) + lines[-3][:50])
    bench(tiny_target(), DRAFTERS, "mt_bench,gsm8k", finished.parent, **OPTIONS)
    again = log.read_text().splitlines(keepends=True)
    assert again[:-3] == lines[:-3] and len(again) == len(lines)
    with pytest.raises(CoralError, match="other settings"):
        bench(tiny_target(), DRAFTERS, "gsm8k", finished.parent, **OPTIONS)


def test_report(finished: Path) -> None:
    """Stops a table of a deepened, random target that does not say so, and one that hides wrong output."""
    written = report(finished)
    text = written[0].read_text()
    assert "deepened" in text and "Random weights." in text and "coral bench" in text
    assert all(
        name in text for name in ("HF generate", "HF prompt lookup", "chain, not coupled", "identical")
    )
    assert all(path.stat().st_size > 1000 for path in written)
    results = json.loads(finished.read_text())
    next(row for row in results["rows"] if row["suite"] == "all" and row["kind"] == "drafter")["wrong"] = 2
    assert "**2 wrong**" in markdown(results)


def test_hugging_face_writes_past_its_end_token() -> None:
    """Stops a peer that ends early and so looks faster, and one that leaves the model's defaults changed."""
    target = tiny_target()
    defaults = target.model.generation_config
    defaults.eos_token_id = list(range(28))
    written = methods.hugging_face(target)([1, 2, 3], Sampling(), 0, 9)
    assert len(written.tokens) == written.num_cycles == 9
    assert target.model.generation_config is defaults


def test_group_recall_is_the_targets_mass_along_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops masses of the wrong position, depth or cycle: they are computed again from the written text."""
    target, budget = tiny.tiny_target(), Budget(3, 3, 9)
    proposer, length = tiny.random_drafter(target), 20
    prompts = [tiny.prompt_of(n) for n in (6, 9)]
    assert recall_by_depth(target, proposer, prompts, length, budget) is None
    proposer.head = head = tiny.routed_head(target, active=2)
    # Groups that depend on the level, so that a level taken for another is seen.
    monkeypatch.setattr(head, "choose", lambda features, scores: (
        head.router(features), torch.tensor([0, 1] if len(features) == 1 else [2, 3])))  # fmt: skip
    found = recall_by_depth(target, proposer, prompts, length, budget)
    expected: list[list[float]] = [[], [], []]
    for prompt in prompts:
        written = tiny.write(target, proposer, [prompt], length, budget=budget)
        law = target.model(torch.tensor(written.texts)).logits[0].softmax(-1)
        at = len(prompt) - 1
        for one in written.cycles[:-1]:  # nothing is proposed after the last
            levels = min(3, len(written.texts[0]) - at - 2)
            for depth in range(min(one.num_accepted + 1, levels)):
                ids = head.ids[[0, 1] if depth == 0 else [2, 3]]
                expected[depth].append(float(law[at + depth, ids[ids >= 0]].sum()))
            at += len(one.tokens)
    assert found is not None and (found["groups"], found["active"]) == (4, 2)
    assert len(found["cycles"]) > 1
    assert found["cycles"] == [len(masses) for masses in expected if masses]
    assert found["recall"] == pytest.approx([sum(m) / len(m) for m in expected if m], abs=1e-5)
    monkeypatch.undo()
    proposer.head = tiny.routed_head(target, active=4)
    whole = recall_by_depth(target, proposer, prompts, length, budget)
    assert whole is not None and whole["recall"] == pytest.approx([1.0] * len(whole["recall"]))
