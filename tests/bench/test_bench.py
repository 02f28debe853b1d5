"""A table people quote: each test names the way in which a number in it could be false."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from coral.bench import formulas, methods
from coral.bench.costs import Costs
from coral.bench.formulas import acceptance_by_depth, repeated, tau, unrepeated_cycles
from coral.bench.methods import load_assistant
from coral.bench.recall import recall_by_depth
from coral.bench.records import Record
from coral.bench.report import _beside_peers, markdown, report
from coral.bench.run import bench
from coral.bench.settings import BenchConfig
from coral.data import prepared
from coral.data.prepare import PrepareConfig, prepare
from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.decoding.state import Cycle
from coral.drafters.lookup import NGram
from coral.errors import CoralError
from coral.suites import prompts as suites
from coral.target.target import Target
from coral.tree import DraftTree, TreeSize

ROW = {
    "kind", "drafter", "suite", "temperature", "coupled", "dtype", "tokens", "cycles", "seconds",
    "prefill_seconds", "tokens_per_second", "speedup", "speedup_without_prefill", "speedup_over_hf", "tau",
    "tau_unrepeated", "repeat_share", "acceptance_by_depth", "draft_share", "verify_share", "equal",
    "near_tie", "wrong", "identical", "c", "nodes", "draft_forwards", "v", "ceiling",
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
    loaded = suites.load(suites.SHIPPED)
    assert {name: len(prompts) for name, prompts in loaded.items()} == suites.SHIPPED
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


def test_spec_bench_becomes_the_six_suites_that_it_reports(tmp_path: Path) -> None:
    """Stops one speedup over texts as different as translation and retrieval, and files that are split by
    chance: MT-bench's categories are common words."""
    path = tmp_path / "questions.jsonl"

    def write(*categories: str) -> str:
        records = [{"question_id": i, "category": c, "turns": ["a"]} for i, c in enumerate(categories)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    tasks = ("translation", "summarization", "qa", "math_reasoning", "rag")
    loaded = suites.load(write("writing", "math", "stem", *tasks, *tasks, "coding"), limit=2)
    assert list(loaded) == ["mt_bench", *tasks]
    assert all(len(prompts) == 2 for prompts in loaded.values())
    assert [p.category for p in suites.load(str(path))["mt_bench"]] == ["writing", "math", "stem", "coding"]
    with pytest.raises(CoralError, match=r"'mt_bench' of .* named twice"):
        suites.load(["mt_bench", str(path)])
    assert list(suites.load(write("writing", "math"))) == ["questions"]
    assert list(suites.load(write("qa", "rag", "jokes"))) == ["questions"]


def test_held_out_prompts_of_prepared_data(tmp_path: Path) -> None:
    """Stops a template put around prompts that have one, and prompts of another tokenizer that pass."""
    rows = [
        {"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": "b"}]} for c in "cdefg"
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = tiny_target()
    target.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}a{% endfor %}"
    prepare([tmp_path / "c.jsonl"], target.tokenizer, tmp_path / "data", PrepareConfig(held_out=2))
    data = str(tmp_path / "data")
    held_out = prepared.load(data).held_out_prompts
    assert [suites.render(None, prompt) for prompt in suites.load(data)["held_out"]] == held_out
    more, config = tmp_path / "more.jsonl", BenchConfig(max_new_tokens=3, peers=False)
    more.write_text('{"id": 1, "turns": ["ab"]}')
    results = json.loads(bench(target, {}, f"{data},{more}", tmp_path / "out", config).read_text())
    assert {row["suite"]: row["tokens"] for row in results["rows"]} == {"held_out": 6, "more": 3, "all": 9}
    target.tokenizer.add_tokens(["new"])
    with pytest.raises(CoralError, match="the target's own tokenizer"):
        bench(target, {}, data, tmp_path / "other", config)
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
    """Stops a ceiling against the step of another way of plain decoding than the fastest."""
    costs = Costs("float32", "eager", {}, 0.5, {1: 1.0, 2: 0.5, 4: 0.9}, {})
    assert (costs.v(2), costs.v(3), costs.v(99)) == (1.0, 1.4, 1.8)


class Chain:
    """Drafts the same id again and again: a drafter that is nearly always wrong."""

    layers = ()

    def propose(self, states: list, tree_size: TreeSize) -> list[DraftTree]:
        chain = torch.tensor([-1, 0, 1])
        return [DraftTree(torch.tensor([s.tokens[-1], 3, 3]), chain, -torch.arange(3.0), 2) for s in states]


DRAFTERS = {"chain": lambda target, coupled: Chain(), "look": lambda target, coupled: NGram(3)}
CONFIG = BenchConfig(
    limit=2, deepen=3, cost_ratio=0.2, temperatures=(0.0, 1.0), coupled=(True, False),
    max_new_tokens=14, ignore_eos=True, note="Random weights.",
)  # fmt: skip
COMMAND = "coral bench --suite mt_bench,gsm8k"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("bench")
    return bench(tiny_target(), DRAFTERS, "mt_bench,gsm8k", output, CONFIG, command=COMMAND)


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


def test_speedup_is_of_tokens_a_second() -> None:
    """Stops a peer that looks fast because its samples end early, and prefill that is taken off one side."""
    shared = {"dtype": "float32", "temperature": 1.0, "coupled": False, "suite": "s", "prompt": "1",
              "turn": 0, "num_cycles": 1, "cycles": [], "verdict": None}  # fmt: skip
    texts = [("plain", "plain", 10, 2.0, 1.0), ("peer", "hf_generate", 5, 3.0, 2.5)]
    records = [
        Record(**shared, kind=kind, method=name, tokens=[1] * n, seconds=s, prefill_seconds=p)
        for kind, name, n, s, p in texts
    ]
    costs = Costs("float32", "eager", {}, 1.0, {1: 1.0, 2: 1.0}, {})
    found = {row["drafter"]: row for row in formulas.results_of(records, {"float32": costs})}
    assert found["hf_generate"]["speedup"] == pytest.approx((5 / 3) / (10 / 2))
    assert found["hf_generate"]["speedup_without_prefill"] == pytest.approx((5 / 0.5) / (10 / 1))
    assert found["plain"]["speedup"] == found["plain"]["speedup_without_prefill"] == 1


def test_resume(finished: Path) -> None:
    """Stops a second measurement of what is finished, a torn line that breaks the file, and mixed benches."""
    log = finished.with_name("records.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-3]) + lines[-3][:50])
    bench(tiny_target(), DRAFTERS, "mt_bench,gsm8k", finished.parent, CONFIG, command=COMMAND)
    again = log.read_text().splitlines(keepends=True)
    assert again[:-3] == lines[:-3] and len(again) == len(lines)
    with pytest.raises(CoralError, match="other settings"):
        bench(tiny_target(), DRAFTERS, "gsm8k", finished.parent, CONFIG)


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


def test_texts_end_where_they_are_to(tmp_path: Path) -> None:
    """Stops a method that writes on behind the end that others keep to, and is paid for it in tokens."""
    target = confident(tmp_path)
    ways = [
        methods.ours(target, Plain(), TreeSize(1, 0, 1)),
        methods.ours(target, NGram(), TreeSize(2, 10, 10)),
        methods.hugging_face(target),
        methods.hugging_face(target, prompt_lookup_num_tokens=10),
        methods.hugging_face(target, load_assistant(tmp_path, target)),
    ]
    whole = ways[0]([0, 1, 0], Sampling(), 0, 9).tokens
    ends = frozenset([whole[4], 27])
    texts = [way([0, 1, 0], Sampling(), 0, 9, ends).tokens for way in ways]
    assert texts == [whole[: whole.index(whole[4]) + 1]] * len(ways)


def test_hugging_face_writes_past_its_end_token() -> None:
    """Stops a peer that ends early and so looks faster, and one that leaves the model's defaults changed."""
    target = tiny_target()
    defaults = target.model.generation_config
    defaults.eos_token_id = list(range(28))
    written = methods.hugging_face(target)([1, 2, 3], Sampling(), 0, 9)
    assert len(written.tokens) == written.num_cycles == 9
    assert target.model.generation_config is defaults


def confident(directory: Path, **config: object) -> Target:
    """The tiny target with one likely token everywhere, and itself in `directory`, to assist it."""
    target = tiny_target()
    with torch.no_grad():
        target.model.lm_head.weight *= 100
    target.model.save_pretrained(directory)
    GenerationConfig(**config).save_pretrained(directory)
    target.tokenizer.save_pretrained(directory)
    return target


def test_hf_assisted_counts_forwards_of_the_target(tmp_path: Path) -> None:
    """Stops draft forwards that are counted as cycles, and an assistant held back by its own settings or by
    prompt tokens taken for padding: one that agrees drafts the whole text, past end tokens, and the target
    reads it once."""
    target = confident(tmp_path, eos_token_id=list(range(28)), num_assistant_tokens=1)
    write = methods.hugging_face(target, load_assistant(tmp_path, target))
    plain = methods.hugging_face(target)([0, 1, 0], Sampling(), 0, 9)
    assert plain.num_cycles == 9
    for _ in range(2):  # the second text begins as the first did
        written = write([0, 1, 0], Sampling(), 0, 9)
        assert written.tokens == plain.tokens and written.num_cycles == 1
    assert len(write([0, 1, 0], Sampling(temperature=1.0), 0, 9).tokens) == 9


@pytest.mark.slow
def test_hf_assisted_in_a_bench(tmp_path: Path) -> None:
    """Stops rows of two assistants under one name, a text that nobody compared, and a wrong cost ratio."""
    target = confident(tmp_path / "assistant")
    suite, output = tmp_path / "mine.jsonl", tmp_path / "out"
    suite.write_text('{"id": 1, "turns": ["abcd"]}')

    def run(assistant: Path, name: str = "look", **options: object) -> Path:
        config = BenchConfig(max_new_tokens=5, assistant=str(assistant), **options)
        return bench(target, {name: DRAFTERS["look"]}, str(suite), output, config)

    written = report(run(tmp_path / "assistant"))[0].read_text()
    rows = json.loads((output / "results.json").read_text())["rows"]
    (row,) = (row for row in rows if row["drafter"] == "hf_assisted" and row["suite"] == "mine")
    assert (row["kind"], row["cycles"], row["c"], row["equal"], row["wrong"]) == ("peer", 1, 1.0, 1, 0)
    assert "| HF assisted |" in written and f"drafts with {tmp_path / 'assistant'}" in written
    assert "Over all prompts look is" in written
    other = tmp_path / "other"
    confident(other)
    with pytest.raises(CoralError, match="other settings"):
        run(other)
    with pytest.raises(CoralError, match="reserved"):
        run(other, "hf_assisted")
    with pytest.raises(CoralError, match="one of the two options"):
        run(other, peers=False)
    with pytest.raises(CoralError, match="cannot be used: there is no"):
        load_assistant(tmp_path / "none", target)
    words = target.tokenizer
    words.add_tokens(["new"])
    words.save_pretrained(other)
    with pytest.raises(CoralError, match="another vocabulary"):
        load_assistant(other, confident(tmp_path / "again"))


def test_the_aim_is_stated_for_what_hardly_repeats() -> None:
    """Stops a win over lookup on loops that is told as a win on text, and a peer that is left out overall."""

    def row(kind: str, name: str, suite: str, seconds: float, repeats: float = 0.1) -> dict[str, object]:
        return {"kind": kind, "drafter": name, "suite": suite, "seconds": seconds, "tokens": 60,
                "repeat_share": repeats, "temperature": 0.0, "coupled": False}  # fmt: skip

    seconds = {  # of two calm suites, one that repeats, and all
        ("plain", "plain"): (9, 9, 9, 27), ("peer", "hf_generate"): (9, 9, 9, 27),
        ("peer", "hf_assisted"): (6, 4, 6, 16), ("peer", "hf_prompt_lookup"): (9, 8, 1, 18),
        ("peer", "ngram"): (4, 4, 2, 10), ("drafter", "a"): (3, 5, 4, 12), ("drafter", "b"): (5, 4, 1, 10),
    }  # fmt: skip
    rows = [
        row(*method, suite, s, 0.3 if suite == "loops" else 0.1)
        for method, times in seconds.items()
        for suite, s in zip(("qa", "rag", "loops", "all"), times, strict=True)
    ]
    assert _beside_peers(rows) == [
        "Where less than 20% repeats (qa, rag) a is 1.25x as fast as HF assisted, the fastest HF peer.",
        "Over all prompts b is 1.00x as fast as n-gram, the fastest peer.",
        "",
    ]
    assert _beside_peers([r for r in rows if r["kind"] != "peer"]) == []


def test_group_recall_is_the_targets_mass_along_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops masses of the wrong position, depth or cycle: they are computed again from the written text."""
    target, tree_size = tiny.tiny_target(), TreeSize(3, 3, 9)
    proposer, length = tiny.random_drafter(target), 20
    prompts = [tiny.prompt_of(n) for n in (6, 9)]
    assert recall_by_depth(target, proposer, prompts, length, tree_size) is None
    proposer.head = head = tiny.routed_head(target, active=2)
    # Groups that depend on the level, so that a level taken for another is seen.
    monkeypatch.setattr(head, "choose", lambda features, scores: (
        head.router(features), torch.tensor([0, 1] if len(features) == 1 else [2, 3])))  # fmt: skip
    found = recall_by_depth(target, proposer, prompts, length, tree_size)
    expected: list[list[float]] = [[], [], []]
    for prompt in prompts:
        written = tiny.write(target, proposer, [prompt], length, tree_size=tree_size)
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
    whole = recall_by_depth(target, proposer, prompts, length, tree_size)
    assert whole is not None and whole["recall"] == pytest.approx([1.0] * len(whole["recall"]))
