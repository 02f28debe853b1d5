"""Conversations, prepared data, preview and regeneration, on a tiny tokenizer without files."""

import gzip
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example as the_case
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny_tokenizer import (
    ASSISTANT,
    CHATML,
    CLOSED,
    EOT,
    FORGETFUL,
    NO_SYSTEM,
    PAD,
    PLAIN,
    SPECIALS,
    STRIPS,
    TEXT_ONLY,
    tiny_tokenizer,
)

from coral.data.batches import Turns, answer_packed, answer_padded, read_answer
from coral.data.chat_format import ChatFormat, Example
from coral.data.conversations import BadRecordError, Conversation, Dropped, parse, read
from coral.data.prepare import PrepareConfig, packed, prepare
from coral.data.prepared import check, load, report
from coral.data.preview import preview
from coral.data.regenerate import regenerate
from coral.errors import CoralError

TEMPLATES = {"plain": PLAIN, "chatml": CHATML, "closed": CLOSED, "text only": TEXT_ONLY}
CHATS = {name: ChatFormat(tiny_tokenizer(template)) for name, template in TEMPLATES.items()}


def turns(*contents: str, system: str | None = None) -> list[dict[str, object]]:
    said = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *said] if system else said


def jsonl(path: Path, *records: object) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    text = "".join(line + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def many(path: Path, count: int) -> Path:
    """`count` conversations of one to three rounds and of different length."""
    said = [
        turns(
            *(f"{word} {i} {'the ' * (i * 7 % 11)}{k}" for k in range(1 + i % 3) for word in ("ask", "say"))
        )
        for i in range(count)
    ]
    return jsonl(path, *({"messages": messages} for messages in said))


# ---------------------------------------------------------------------------------------------- reading


def test_both_formats_give_the_same_messages() -> None:
    """A ShareGPT record with its roles confused would train the drafter on what people asked."""
    shared = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a"},
    ]
    expected = turns("q", "a", system="s")
    assert (
        parse(json.dumps({"conversations": shared})) == parse(json.dumps({"messages": expected})) == expected
    )


BAD = {
    "unreadable JSON": "{nonsense",
    "not a JSON object": [1],
    "nothing under 'messages', 'conversations', 'conversation' or 'prompt'": {},
    "a turn is not a JSON object": {"messages": [None]},
    "'content' of a turn is empty": {"messages": turns("q", " \n")},
    "'content' of a turn is not valid Unicode (half of a surrogate pair)": (
        '{"messages": [{"role": "user", "content": "\\ud800"}]}'
    ),
    "no assistant turn under 'messages'": {"messages": turns("q")},
    "'finished' is not true or false": {
        "messages": [*turns("q"), {"role": "assistant", "content": "a", "finished": 0}]
    },
}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_bad_records_are_counted_with_their_line_number(tmp_path: Path, suffix: str) -> None:
    """Silent drops hide a broken file; a line number off by one sends people to the wrong line."""
    good = {"messages": turns("q", "a")}
    source = jsonl(tmp_path / f"x{suffix}", good, "", *BAD.values(), good)
    dropped = Dropped()
    assert [c.where for c in read([source], dropped)] == [f"{source}:1", f"{source}:{3 + len(BAD)}"]
    details = {2: " (it has nothing)", 3: " (NoneType)"}
    notes = [f"{source}:{n + 3}: {reason}{details.get(n, '')}" for n, reason in enumerate(BAD)]
    assert dropped.notes == notes
    assert dropped.counts == dict.fromkeys(BAD, 1)
    brief = Dropped(keep=2)
    list(read(jsonl(tmp_path / "again.jsonl", "{", "{", "{", [1]), brief))
    assert [note.rpartition("jsonl:")[2] for note in brief.notes] == [
        "1: unreadable JSON",
        "2: unreadable JSON",
        "4: not a JSON object",
    ]
    assert brief.total == 4


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    """A truncated download must not pass for a short file."""
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(b'{"messages": []}\n' * 50)[:-12])
    for source in (torn, tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(CoralError, match=source.name):
            list(read([source], Dropped()))


# ------------------------------------------------------------------------------------------ mask of answers

word = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: text.strip() and not any(special in text for special in SPECIALS)
)


@settings(max_examples=150, deadline=None)
@the_case("text only", [("0", "a")], None)
@given(
    st.sampled_from(sorted(CHATS)), st.lists(st.tuples(word, word), min_size=1, max_size=3), st.none() | word
)
def test_mask_covers_answers_and_their_end_tokens_exactly(
    name: str, said: list[tuple[str, str]], system: str | None
) -> None:
    """A mask off by one trains on the user's text, never teaches the end, or teaches what follows it."""
    chat = CHATS[name]
    messages = turns(*(content for pair in said for content in pair), system=system)
    try:
        example = chat.encode(Conversation("x:1", messages))
    except BadRecordError:
        # A newline of the text joins the template's newline beside it into one token; without special tokens
        # between them, an answer's first letters also join the space before it.
        assert name in ("chatml", "closed", "text only")
        newline = any(text.startswith("\n") or text.endswith("\n") for pair in said for text in pair)
        joined = any(chat.tokenize(f" {answer}")[:1] != chat.tokenize(" ") for _, answer in said)
        assert newline or (name == "text only" and joined)
        return
    end = "\n" if name == "text only" else "<|eot|>"
    runs: list[list[int]] = []
    for t, trained in enumerate(example.loss_mask):
        if trained and not example.loss_mask[t - 1]:
            runs.append([])
        if trained:
            runs[-1].append(example.input_ids[t])
    assert [chat.tokenizer.decode(run) for run in runs] == [answer + end for _, answer in said]
    assert example.loss_mask[-1]
    text = chat.render(messages)
    assert text.startswith(chat.tokenizer.decode(example.input_ids))
    assert example.input_ids.count(PAD) == 0 and example.input_ids.count(ASSISTANT) in (len(said), 0)


def test_an_unfinished_answer_has_no_end_token_to_train_on() -> None:
    """Training an end token where the target was merely cut teaches the drafter to stop early."""
    for chat in CHATS.values():
        messages = turns("q", "one", "r", "two")
        whole = chat.encode(Conversation("x:1", messages))
        cut = chat.encode(Conversation("x:1", [*messages[:3], messages[3] | {"finished": False}]))
        assert cut.input_ids == whole.input_ids
        assert cut.loss_mask == [*whole.loss_mask[:-1], False]


def test_a_template_that_rewrites_history_is_refused_and_last_turns_are_not() -> None:
    """The rows of such a template would train answers after a history that the target never reads."""
    chat = ChatFormat(tiny_tokenizer(FORGETFUL))
    conversation = Conversation("file:7", turns("q", "a", "r", "b"))
    with pytest.raises(CoralError, match=r"file:7.*rewrites history.*--last-turn-only"):
        chat.encode(conversation)
    example = chat.encode(conversation, last_turn_only=True)
    written = [i for i, trained in zip(example.input_ids, example.loss_mask, strict=True) if trained]
    assert chat.tokenizer.decode(written) == "<think></think>b<|eot|>"
    assert chat.tokenizer.decode(example.input_ids).count("<think>") == 1


def test_templates_that_cannot_be_used() -> None:
    """No template, and one whose prompt is not the beginning of the answered text, say what to do instead."""
    with pytest.raises(CoralError, match=r"no chat template.*instruct"):
        ChatFormat(tiny_tokenizer(None))
    chat = ChatFormat(tiny_tokenizer(PLAIN.replace("'<|assistant|>' }}{% endif", "'<|system|>' }}{% endif")))
    with pytest.raises(CoralError, match="generation prompt"):
        chat.encode(Conversation("x:1", turns("q", "a")))
    with pytest.raises(BadRecordError, match="no system"):
        ChatFormat(tiny_tokenizer(NO_SYSTEM)).encode(Conversation("x:1", turns("q", "a", system="s")))


# ---------------------------------------------------------------------------------------------- prepared

lengths = st.lists(st.integers(1, 20), max_size=150)


@given(lengths)
def test_packing_keeps_every_document_exactly_once(sizes: list[int]) -> None:
    """A document lost, split or doubled by packing changes what is trained on without any error."""
    examples = [Example([i] * size, [i % 2 == 0] * size) for i, size in enumerate(sizes)]
    found = []
    for row in packed(iter(examples), 20):
        assert len(row.input_ids) <= 20 and row.document_starts[0] == 0
        for start, end in zip(row.document_starts, [*row.document_starts[1:], None], strict=True):
            found.append((row.input_ids[start:end], row.loss_mask[start:end]))
    assert sorted(found) == [(e.input_ids, e.loss_mask) for e in examples]


def test_prepared_directory_round_trip(tmp_path: Path) -> None:
    """What is on disk is what was encoded, and the counts of the summary are those of the rows."""
    tokenizer = tiny_tokenizer()
    source = many(tmp_path / "x.jsonl", 40)
    with source.open("a") as file:
        file.write("torn\n")
    info = prepare([source], tokenizer, tmp_path / "out", PrepareConfig(held_out=5, max_length=100))
    data = load(tmp_path / "out")
    assert data.info == info
    assert info["examples"] == len(data.dataset) == 35 and len(data.held_out_prompts) == info["held_out"] == 5
    rows = list(data.dataset)
    assert info["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert info["trained_tokens"] == sum(sum(row["loss_mask"]) for row in rows)
    assert max(len(row["input_ids"]) for row in rows) == 100 and all(
        row["document_starts"] == [0] for row in rows
    )
    assert f"{source}:41: unreadable JSON" in report(info)
    packed_info = prepare(
        [source], tokenizer, tmp_path / "out", PrepareConfig(held_out=5, max_length=100, pack=True)
    )
    assert packed_info["rows"] < info["rows"]
    assert {k: packed_info[k] for k in ("examples", "tokens", "trained_tokens", "dropped")} == {
        k: info[k] for k in ("examples", "tokens", "trained_tokens", "dropped")
    }


def test_held_out_prompts_are_never_trained_on(tmp_path: Path) -> None:
    """With repeated prompts, a split by record measures acceptance on prompts that were trained on."""
    tokenizer = tiny_tokenizer()
    records = [{"messages": turns(f"question {i % 12}", f"answer {i}")} for i in range(60)]
    prepare([jsonl(tmp_path / "x.jsonl", *records)], tokenizer, tmp_path / "out", PrepareConfig(held_out=4))
    data = load(tmp_path / "out")
    assert len({tuple(prompt) for prompt in data.held_out_prompts}) == 4
    assert all(prompt[-1] == ASSISTANT for prompt in data.held_out_prompts)
    assert len(data.dataset) == 40
    for row in data.dataset:
        assert not any(row["input_ids"][: len(prompt)] == prompt for prompt in data.held_out_prompts)


def test_the_seed_fixes_the_choice_and_limit_its_size(tmp_path: Path) -> None:
    """Two runs of one command must train on the same rows; `limit` must not take the first file alone."""
    source = many(tmp_path / "x.jsonl", 50)

    def ids(name: str, seed: int) -> list[list[int]]:
        prepare([source], tiny_tokenizer(), tmp_path / name, PrepareConfig(held_out=3, limit=10, seed=seed))
        return load(tmp_path / name).dataset["input_ids"][:]

    assert ids("a", 1) == ids("b", 1) != ids("c", 2)
    assert len(ids("a", 1)) == 10


def test_rows_without_a_trained_token_are_dropped(tmp_path: Path) -> None:
    """Truncation before the answer leaves a row with nothing to learn, and a loss of 0 / 0."""
    source = jsonl(tmp_path / "x.jsonl", {"messages": turns("q" * 50, "a")}, {"messages": turns("q", "a")})
    info = prepare([source], tiny_tokenizer(), tmp_path / "out", PrepareConfig(held_out=0, max_length=20))
    assert info["examples"] == 1
    assert info["dropped"] == {"no token to train on within 20 tokens (--max-length)": 1}


def test_bad_requests_leave_nothing_behind(tmp_path: Path) -> None:
    """One sentence that says what to do, no half-written output, and no foreign directory replaced."""
    tokenizer = tiny_tokenizer()
    source = many(tmp_path / "x.jsonl", 5)
    empty = jsonl(tmp_path / "bad.jsonl", "nonsense")
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    cases: list[tuple[Callable[[], object], str]] = [
        (
            lambda: prepare([source], tokenizer, tmp_path / "out", PrepareConfig(held_out=60)),
            "lower held_out",
        ),
        (
            lambda: prepare([empty], tokenizer, tmp_path / "out"),
            r"no usable conversation.*1 record dropped: 1 x unreadable JSON \(the first is .*bad.jsonl:1\)",
        ),
        (
            lambda: prepare([source], tokenizer, tmp_path / "out", PrepareConfig(held_out=0, max_length=2)),
            "can be trained on",
        ),
        (lambda: prepare([source], tokenizer, home, PrepareConfig(held_out=0)), "holds other files"),
        (
            lambda: prepare([source], tiny_tokenizer(FORGETFUL), tmp_path / "out", PrepareConfig(held_out=0)),
            "rewrites history",
        ),
        (lambda: load(tmp_path / "none"), "does not exist"),
        (lambda: load(home), "no prepared data"),
    ]
    for call, message in cases:
        with pytest.raises(CoralError, match=message):
            call()
    assert sorted(tmp_path.rglob("*")) == before


def test_data_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    """Ids of another tokenizer index the wrong embeddings silently, or crash on the device."""
    tokenizer = tiny_tokenizer()
    info = prepare([many(tmp_path / "x.jsonl", 5)], tokenizer, tmp_path / "out", PrepareConfig(held_out=0))
    check(info, len(tokenizer) + 50, tokenizer)  # a target's embedding is often padded
    with pytest.raises(CoralError, match="vocabulary of 100"):
        check(info, 100)
    other = tiny_tokenizer()
    other.add_tokens(["coral"])
    with pytest.raises(CoralError, match="own tokenizer"):
        check(info, 300, other)


def test_preview_shows_what_is_trained_with_and_without_colour() -> None:
    """Colour alone says nothing in a log file; text of others must not send escape codes to the terminal."""
    tokenizer = tiny_tokenizer()
    example = CHATS["plain"].encode(Conversation("x:1", turns("ask \x1b[2J", "say [bold]")))
    console = Console(width=200, record=True, force_terminal=False, color_system=None)
    with console.capture() as shown:
        preview([example], tokenizer, console)
    assert "<|user|>ask ␛[2J<|eot|><|assistant|>[[say [bold]<|eot|>]]" in shown.get()
    colourful = Console(width=200, force_terminal=True, color_system="standard")
    with colourful.capture() as shown:
        preview([example], tokenizer, colourful)
    assert "\x1b[32msay [bold]\x1b[0m" in shown.get() and "\x1b[2J" not in shown.get()


# -------------------------------------------------------------------------------------------- regenerate


class FakeTarget:
    """Answers that depend on (prompt, temperature, sequence id) alone; some are empty, some do not end."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.calls: list[tuple[list[list[int]], list[float], list[int]]] = []
        self.stop_after = stop_after

    def __call__(
        self, prompts: list[list[int]], temperatures: list[float], sequence_ids: list[int]
    ) -> list[list[int]]:
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((prompts, temperatures, sequence_ids))
        return [self.answer(*each) for each in zip(prompts, temperatures, sequence_ids, strict=True)]

    def answer(self, prompt: list[int], temperature: float, sequence_id: int) -> list[int]:
        key = (sum(prompt) + int(temperature * 10) + sequence_id) % 7
        if key == 0:
            return [EOT]
        return [*(40 + (key + k) % 50 for k in range(key))] + [EOT] * (key != 3)

    def write(self, admit: Any) -> Any:
        """As `serving.engine.Engine.write`, three at once; they end out of order."""
        live: list[FakeText] = []
        while True:
            while len(live) < 3 and (text := admit()):
                live.append(text)
            if not live:
                return
            text = live.pop(len(self.calls) % len(live))
            (text.written,) = self([text.prompt], [text.temperature], [text.sequence_id])
            yield text


@dataclass(eq=False)
class FakeText:
    prompt: list[int]
    temperature: float
    sequence_id: int
    written: list[int] = field(default_factory=list)


def run(source: Path, output: Path, target: FakeTarget, **options: Any) -> Any:
    settings = {"seed": options.pop("seed", 0), "max_new_tokens": options.pop("max_new_tokens", 8)}
    turns = Turns(
        tiny_tokenizer(),
        context_length=300,
        max_new_tokens=settings["max_new_tokens"],
        keep_unfinished=options.pop("keep_unfinished", True),
    )
    packed = options.pop("packed", False)
    answer = answer_packed(turns, FakeText, target.write) if packed else answer_padded(turns, target, 4)
    return regenerate([source], output, answer, settings=settings, **options)  # type: ignore[arg-type]


def test_every_record_is_accounted_for(tmp_path: Path) -> None:
    """Records that vanish without a count make a data set smaller than people believe."""
    source = many(tmp_path / "x.jsonl", 60)
    with source.open("a") as file:
        file.write("torn\n" + json.dumps({"messages": turns("q" * 500)}) + "\n")
        file.write(
            json.dumps({"messages": turns("again")}) + "\n" + json.dumps({"messages": turns("x")}) + "\n"
        )
    result = run(source, tmp_path / "out.jsonl", FakeTarget())
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert result.input == 64 and result.written == len(records) and result.skipped.total == 2
    assert result.failed.total > 0 and "64 records =" in str(result)
    for record in records:
        line = int(record["source"].rpartition(":")[2])
        given = parse(source.read_text().splitlines()[line - 1], prompts_only=True)
        assert [m["content"] for m in record["messages"][::2]] == [
            m["content"] for m in given[: len(record["messages"])][::2]
        ]
        assert record["messages"][-1]["role"] == "assistant"
    assert result.unfinished == sum("finished" in record["messages"][-1] for record in records) > 0
    info = prepare([tmp_path / "out.jsonl"], tiny_tokenizer(), tmp_path / "data", PrepareConfig(held_out=2))
    assert info["dropped"] == {}


def test_half_of_the_records_are_greedy_and_batches_are_full(tmp_path: Path) -> None:
    """A temperature by batch, or a batch per turn and conversation, would be wrong or slow."""
    source = many(tmp_path / "x.jsonl", 64)
    target = FakeTarget()
    run(source, tmp_path / "out.jsonl", target)
    asked = {i: t for _, temperatures, ids in target.calls for i, t in zip(ids, temperatures, strict=True)}
    assert asked == {i: (0.0, 0.8)[i % 2] for i in range(64)}
    assert sum(len(prompts) == 4 for prompts, _, _ in target.calls) >= 16
    for prompts, _, _ in target.calls:
        assert all(prompt[-1] == ASSISTANT for prompt in prompts)


@pytest.mark.parametrize("packed", [False, True])
def test_a_later_turn_follows_the_regenerated_answer(tmp_path: Path, packed: bool) -> None:
    """With the old answer left in the history, the target answers a conversation that it never had."""
    source = jsonl(tmp_path / "x.jsonl", {"messages": turns("one", "OLD", "two", "OLD")})
    target = FakeTarget()
    target.answer = lambda prompt, temperature, sequence_id: [80, 81, EOT]  # type: ignore[method-assign]
    run(source, tmp_path / "out.jsonl", target, packed=packed)
    messages = json.loads((tmp_path / "out.jsonl").read_text())["messages"]
    written = tiny_tokenizer().decode([80, 81])
    assert messages == turns("one", written, "two", written)
    second = tiny_tokenizer().decode(target.calls[1][0][0])
    assert second == f"<|bos|><|user|>one<|eot|><|assistant|>{written}<|eot|><|user|>two<|eot|><|assistant|>"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("keep_unfinished", [True, False])
@pytest.mark.parametrize("stop_after", [0, 1, 5, 17])
def test_a_resumed_run_gives_the_file_of_one_that_never_stopped(
    tmp_path: Path, stop_after: int, keep_unfinished: bool, packed: bool
) -> None:
    """Lines lost, doubled or, where the order is fixed, moved by a resume; a torn last line taken for one."""
    source = many(tmp_path / "x.jsonl", 70)
    options = {"keep_unfinished": keep_unfinished, "packed": packed}
    whole = run(source, tmp_path / "whole.jsonl", FakeTarget(), **options)
    output = tmp_path / "resumed.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(source, output, FakeTarget(stop_after), **options)
    if output.exists():
        output.write_bytes(output.read_bytes()[:-9])  # as a power cut leaves it
    again = FakeTarget()
    resumed = run(source, output, again, **options)
    made, expected = output.read_bytes(), (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(made.splitlines()) == sorted(expected.splitlines())
    assert packed or made == expected
    assert (resumed.written, resumed.unfinished) == (whole.written, whole.unfinished)
    assert (resumed.failed.counts, resumed.skipped.counts) == (whole.failed.counts, whole.skipped.counts)
    third = FakeTarget()
    run(source, output, third, **options)
    assert not third.calls


def test_going_on_with_other_settings_is_refused(tmp_path: Path) -> None:
    """A file half of one seed and half of another is what nobody asked for."""
    source = many(tmp_path / "x.jsonl", 20)
    output = tmp_path / "out.jsonl"
    run(source, output, FakeTarget())
    before = output.read_bytes()
    for change in ({"seed": 1}, {"temperatures": (1.0,)}, {"max_new_tokens": 9}, {"limit": 3}):
        with pytest.raises(CoralError, match="other sources or settings"):
            run(source, output, FakeTarget(), **change)
    jsonl(foreign := tmp_path / "foreign.jsonl", {"messages": turns("q", "a")})
    with pytest.raises(CoralError, match=r"there is no foreign\.account\.json"):
        run(source, foreign, FakeTarget())
    with pytest.raises(CoralError, match="of its own"):
        run(source, source, FakeTarget())
    assert output.read_bytes() == before


def test_sources_that_changed_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    """A record in front of those that were answered: one is then never answered and one twice, both without a
    word; records that came behind them are only more to answer.
    """
    source, output = many(tmp_path / "x.jsonl", 20), tmp_path / "out.jsonl"
    whole = source.read_text()
    run(source, output, FakeTarget())
    made = output.read_bytes()
    for changed in (
        json.dumps({"messages": turns("new", "old")}) + "\n" + whole,
        "".join(whole.splitlines(keepends=True)[1:]),
        whole.replace("ask 7", "ask seven"),
        "".join(whole.splitlines(keepends=True)[:-1]),
        "\n" + whole,
    ):
        for limit in (None, 20):
            source.write_text(changed)
            kept = tmp_path / f"{limit}.jsonl"
            if limit:
                source.write_text(whole)
                run(source, kept, FakeTarget(), limit=limit)
                source.write_text(changed)
            before, target = (kept if limit else output).read_bytes(), FakeTarget()
            with pytest.raises(CoralError, match="other sources or settings"):
                run(source, kept if limit else output, target, limit=limit)
            assert not target.calls and (kept if limit else output).read_bytes() == before
            kept.unlink(missing_ok=True)
            kept.with_suffix(".account.json").unlink(missing_ok=True)
            kept.with_suffix(".failed.jsonl").unlink(missing_ok=True)
    source.write_text(whole + json.dumps({"messages": turns("more", "old")}) + "\n")
    assert run(source, output, FakeTarget()).input == 21
    assert output.read_bytes().startswith(made)


def test_the_bar_counts_every_record_that_is_read(tmp_path: Path) -> None:
    """A bar that stands still over records that are left out, and ends before its end."""
    source = many(tmp_path / "x.jsonl", 12)
    with source.open("a") as file:
        file.write("torn\n" * 5)
    file = io.StringIO()
    shown = Console(file=file, width=200, force_terminal=False)
    prepare(source, tiny_tokenizer(), tmp_path / "a", PrepareConfig(held_out=4), console=shown)
    prepare(source, tiny_tokenizer(), tmp_path / "b", PrepareConfig(held_out=4, limit=3), console=shown)
    run(source, tmp_path / "out.jsonl", FakeTarget(), console=shown, temperatures=[0.0])
    bars = [line for line in file.getvalue().splitlines() if " of " in line]
    assert [re.search(r"(\w+) (\d+) of (\d+)", line).groups() for line in bars] == [  # type: ignore[union-attr]
        ("preparing", "17", "17"), ("drawing", "17", "17"), ("preparing", "3", "3"),
        ("regenerating", "17", "17"),
    ]  # fmt: skip


def test_a_template_that_leaves_out_the_thought_is_counted(tmp_path: Path) -> None:
    """Answers that are trained otherwise than their template shows them, without a word in the summary."""
    thinks = [{"messages": turns("q", "<think>one</think>two")}, {"messages": turns("q", "two")}]
    info = prepare(
        jsonl(tmp_path / "x.jsonl", *thinks),
        tiny_tokenizer(STRIPS),
        tmp_path / "out",
        PrepareConfig(held_out=0),
    )
    (what,) = info["changed"]
    assert info["changed"][what] == 1 and f"1 x {what}" in report(info) and "trained as the record" in what


def test_greedy_repeats_are_skipped(tmp_path: Path) -> None:
    """The same prompt at temperature 0 costs a generation and gives the same row once more."""
    source = jsonl(tmp_path / "x.jsonl", *[{"messages": turns("same", f"a{i}")} for i in range(10)])
    target = FakeTarget()
    result = run(source, tmp_path / "out.jsonl", target)
    assert sorted(i for _, _, ids in target.calls for i in ids) == [0, 1, 3, 5, 7, 9]
    assert result.skipped.counts == {"same turns as an earlier record at temperature 0": 4}


def test_reading_an_answer_stops_at_the_first_special_token() -> None:
    """Text behind an end token, half a character at a cut, and an end that the target did not write."""
    chat = CHATS["chatml"]
    hello, half = chat.tokenize("hello"), chat.tokenize("é")[:1]
    assert read_answer([*hello, EOT], chat, 9) == ("hello", True)
    assert read_answer([*hello, EOT, *hello], chat, 9) == ("hello", True)
    assert read_answer([*hello, PAD, EOT], chat, 9) == ("hello", False)
    assert read_answer([*hello, *half], chat, 9) == ("hello", False)
    plain = CHATS["text only"]
    assert read_answer(plain.tokenize("hello\n"), plain, 9) == ("hello", True)
    assert read_answer(hello, plain, len(hello)) == ("hello", False)
