"""The comparison with other engines: a table that compares unlike things would flatter somebody."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real
import real_ours
import real_transformers
import requant
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize
from real_clients import ClientFailed, Records, ask
from real_methods import chosen, every_method
from real_table import HF, LLAMA, PLAIN, Method, Text, differences, first_difference, rows, table
from tiny_pair import save_drafter, save_target

from coral.errors import CoralError


def text(method: str, number: int = 1, prompt: str = "a", tokens: int = 8, **more: Any) -> Text:
    """Twice as fast without the prefill, which writes the first token."""
    ids = more.pop("ids", [*range(tokens)])
    seconds = more.pop("seconds", 2.0)
    forwards = more.pop("forwards", tokens - 1)
    return Text(method, number, prompt, ids, seconds, seconds / 2, len(ids) - 1, forwards)


def method(name: str, precision: str = "BF16") -> Method:
    return Method(name, name, "ours", "directory", precision)


def test_speeds_are_sums_over_sums_and_medians_of_rounds() -> None:
    """Stops a mean of means, in which a text of one token counts as much as one of a hundred."""
    texts = [
        text(PLAIN, 1, "a", tokens=11, seconds=1.0),
        text(PLAIN, 1, "b", tokens=101, seconds=4.0),
        text(PLAIN, 2, "a", tokens=11, seconds=2.0),
        text(PLAIN, 3, "a", tokens=11, seconds=0.5),
    ]
    (row,) = rows([method(PLAIN)], texts, {})
    assert row["decode"] == {"median": 40, "least": 10, "most": 44}  # 20 / 1, 110 / 2.5, 10 / 0.25
    assert row["with_prefill"] == {"median": 22, "least": 5.5, "most": 22.4}


def test_ratios_are_of_the_same_prompts_in_the_same_round() -> None:
    """Stops a method that is ahead since it was stopped before the hard prompts, or ran at a better time."""
    texts = [
        text(PLAIN, 1, "a", seconds=1.0),
        text(PLAIN, 1, "b", seconds=100.0),
        text(PLAIN, 2, "a", seconds=10.0),
        text(PLAIN, 3, "a", seconds=1.0),
        text("ngram", 1, "a", seconds=0.5),
        text("ngram", 2, "a", seconds=2.0),
        text("ngram", 4, "a", seconds=9.0),
    ]
    row = rows([method(PLAIN), method("ngram")], texts, {})[1]
    assert row["over"] == {PLAIN: {"decode": 3.5, "all": 3.5}}  # the median of 2 and 5


def test_nothing_is_divided_by_nothing() -> None:
    """Stops a crash at a text of one token, which takes no time to decode."""
    nothing = Text(PLAIN, 1, "a", [7], 1.0, 0.0, 0, 0)
    (row,) = found = rows([method(PLAIN), method("ngram")], [nothing], {})
    assert row["decode"] is None and row["tau"] is None and row["over"][PLAIN]["decode"] is None
    assert "| - |" in table(found)[2]


def test_where_texts_part() -> None:
    """Stops texts that are called equal where one is the other's beginning."""
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 2]) == first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1


def test_every_round_is_compared() -> None:
    """Stops a wrong text of the second round from passing as the first one's."""
    plain = {1: {"a": text(PLAIN), "b": text(PLAIN, prompt="b")}}
    own = {1: {"a": text("x")}, 2: {"a": text("x", ids=[0, 1, 9]), "c": text("x", prompt="c")}}
    assert differences(own, plain) == {"a": 2}
    assert differences({**own, 3: {"a": text("x", ids=[5])}}, plain) == {"a": 0}


def test_the_table_says_whose_text_differs_and_whose_cannot_be_compared() -> None:
    """Stops "same text" for other weights, and columns that do not fit their heads."""
    texts = [
        text(PLAIN),
        text(HF, ids=[0, 1, 2, 9]),
        text("llama_file", seconds=1.0, forwards=2),
        text(LLAMA),
    ]
    methods = [method(HF), method(LLAMA), method("llama_file", "Q4_1"), method(PLAIN)]
    lines = table(rows(methods, texts, {HF: ["near_tie"]}))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in cells}) == 1
    by_name = {row[0]: row for row in cells}
    assert by_name[HF][-1] == "0 of 1, others from token 3 on (near ties)"
    _, weights, *speeds, over_plain, over_llama, length, same = by_name["llama_file"]
    assert (weights, speeds) == ("Q4_1", ["14.0", "8.0", "4.67x (4.00x)"])
    assert (over_plain, over_llama, length, same) == ("2.00x (2.00x)", "2.00x (2.00x)", "3.50", "-")
    assert by_name[PLAIN][-1] == "yes"
    wrong = table(rows(methods, texts, {HF: ["wrong"]}))[2]
    assert "1 by more than rounding" in wrong


def test_methods_and_their_names(tmp_path: Path) -> None:
    """Stops two methods of one name, whose texts would be one, and a pattern that silently names nothing."""
    options = argparse.Namespace(drafter="d+static", draft_tokens=4, output=tmp_path)
    methods = every_method(options)
    assert len({m.name for m in methods}) == len(methods)
    by_name = {m.name: m for m in methods}
    assert by_name["coral_lookup"].settings == {"drafter": "d+static+ngram"}
    packed = by_name["coral_packed"]
    assert (packed.model, packed.settings) == ("file", {"drafter": "d+static", "dtype": "packed"})
    assert packed.reference == "plain_packed" and by_name["coral"].reference == PLAIN
    assert by_name["llama_q8_0"].reference is None
    assert {m.model for m in methods if m.engine == "llama"} == {"bf16", "q8_0", "file"}
    alone = every_method(argparse.Namespace(drafter=None, draft_tokens=4, output=tmp_path))
    assert {m.name for m in methods} - {m.name for m in alone} == {
        "coral", "coral_lookup", "vllm_drafter", "coral_packed", "coral_lookup_packed",
    }  # fmt: skip
    assert [m.name for m in chosen(methods, "plain, vllm*")] == [
        "vllm",
        "vllm_ngram",
        "vllm_drafter",
        "plain",
    ]
    with pytest.raises(CoralError, match="names no method"):
        chosen(methods, "plain,lama*")


def test_records_go_on_where_they_were_torn(tmp_path: Path) -> None:
    """Stops texts that are lost or written twice when a run is killed, and two runs in one file."""
    path = tmp_path / "out" / "records.jsonl"
    line = {"text": vars(text(PLAIN))}
    log = Records(path, {"settings": 1})
    log.add({"client": {"method": PLAIN, "versions": {}}})
    log.add(line)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[-9:-1])
    again = Records(path, {"settings": 1})
    assert again.texts == {(PLAIN, 1, "a"): text(PLAIN)} and again.clients[PLAIN]["versions"] == {}
    assert path.read_bytes() == whole
    with pytest.raises(CoralError, match="other settings"):
        Records(path, {"settings": 2})
    assert path.read_bytes() == whole


def test_a_client_is_heard_as_it_writes_and_its_failure_is_told(tmp_path: Path) -> None:
    """Stops texts that are kept only when all are written, and an engine's end that passes for success."""
    script = tmp_path / "client.py"
    script.write_text(
        "import json, os, sys\n"
        "job = json.load(open(sys.argv[1]))\n"
        "with open(sys.argv[2], 'w') as answers:\n"
        "    found = {os.environ[name] for name in ('OMP_NUM_THREADS', 'NUMBA_NUM_THREADS')}\n"
        "    print(json.dumps([*found]), file=answers, flush=True)\n"
        "    sys.exit('no such model') if job['fails'] else None\n"
    )
    log = tmp_path / "logs" / "client.log"
    assert [*ask(Path(sys.executable), script, {"fails": False}, log, 3)] == [["3"]]
    answers = ask(Path(sys.executable), script, {"fails": True}, log, 1)
    assert next(answers) == ["1"]
    with pytest.raises(ClientFailed, match="no such model"):
        next(answers)


def test_other_engines_do_not_wait_as_coral_does(tmp_path: Path) -> None:
    """Stops settings that importing coral leaves in the environment from changing another engine's speed."""
    changed = "import coral, os; os.environ['CHANGED'] = '1'; from real_clients import as_started; "
    changed += "print({'CHANGED', 'GOMP_SPINCOUNT'} & as_started().keys(), as_started()['GIVEN'])"
    given = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | {
        "GIVEN": "a=b",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    found = subprocess.run([sys.executable, "-c", changed], env=given, capture_output=True, text=True)
    assert found.stdout == "set() a=b\n", found.stderr


def write_gguf(path: Path) -> np.ndarray:
    writer = GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_1)
    values = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    packed = quantize(values, GGMLQuantizationType.Q4_1)
    writer.add_tensor("blk.0.ffn_up.weight", packed, raw_dtype=GGMLQuantizationType.Q4_1)
    writer.add_tensor("odd.weight", values[:, :20].copy())
    writer.add_tensor("output_norm.weight", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dequantize(packed, GGMLQuantizationType.Q4_1)


@pytest.mark.parametrize(("wanted", "close"), [("F32", 0.0), ("BF16", 2**-8), ("Q8_0", 2**-6), ("Q4_0", 0.3)])
def test_a_file_at_another_precision(wanted: str, close: float, tmp_path: Path) -> None:
    """Stops weights that are rounded again, shapes that are turned, and metadata that is lost."""
    values = write_gguf(tmp_path / "in.gguf")
    assert requant.precision(tmp_path / "in.gguf") == "Q4_1"
    requant.requant(tmp_path / "in.gguf", tmp_path / "out.gguf", wanted)
    assert requant.precision(tmp_path / "out.gguf") == wanted
    reader = GGUFReader(tmp_path / "out.gguf")
    tokens = reader.fields["tokenizer.ggml.tokens"]
    assert tokens.contents() == ["a", "b"] and tokens.types[0] == GGUFValueType.ARRAY
    matrix, odd, norm = reader.tensors
    assert matrix.tensor_type.name == wanted and norm.tensor_type.name == "F32"
    assert odd.tensor_type.name == (wanted if wanted in ("F32", "BF16") else "BF16")
    assert [*matrix.shape] == [64, 6] and [*odd.shape] == [20, 6]
    found = dequantize(matrix.data, matrix.tensor_type).reshape(6, 64)
    assert np.abs(found - values).max() <= close * np.abs(values).max()
    assert not [*tmp_path.glob(".*")]


def test_the_driver_and_our_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stops a run that is first tried in the hour that was kept for it, and one that writes all again."""
    save_target(tmp_path / "target")
    save_drafter(tmp_path / "drafter", tmp_path / "target")
    (tmp_path / "model.gguf").write_bytes(b"our side reads the directory")
    asked = []

    def ask_here(python: Path, script: Path, job: dict[str, Any], log: Path, threads: int) -> Any:
        asked.append(job.get("drafter", "verdicts" if "disputed" in job else HF))
        question, answers = tmp_path / "job.json", tmp_path / "answers"
        question.write_text(json.dumps(job))
        client = {"real_ours": real_ours, "real_transformers": real_transformers}[script.stem]
        client.main(str(question), str(answers))
        yield from map(json.loads, answers.read_text().splitlines())

    monkeypatch.setattr(real, "ask", ask_here)
    output, drafter = tmp_path / "out", str(tmp_path / "drafter")

    def run(tokens: int, only: str) -> int:
        words = f"{output} --target {tmp_path}/model.gguf --directory {tmp_path}/target --drafter {drafter} "
        words += f"--suite gsm8k --limit 2 --rounds 1 --threads 1 --tokens {tokens} --only {only}"
        monkeypatch.setattr("sys.argv", ["real.py", *words.split()])
        return real.main()

    assert run(8, f"{HF},plain") == 0
    assert run(8, f"{HF},plain,coral") == 0
    assert [word for word in asked if word != "verdicts"] == [HF, None, drafter]
    results = json.loads((output / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == [HF, PLAIN, "coral"]
    assert all(row["texts"] == 2 for row in results["rows"]) and results["trees"].keys() == {"CORAL"}
    assert all(set(row["first_differences"].values()) == {None} for row in results["rows"][1:])
    found = [
        json.loads(line)["text"]
        for line in (output / "records.jsonl").read_text().splitlines()[1:]
        if "text" in line
    ]
    assert all(one["decoded"] == len(one["tokens"]) - (one["method"] == HF) for one in found)
    assert all(0 < one["decode_seconds"] < one["seconds"] for one in found)
    assert all(one["forwards"] == one["decoded"] for one in found if one["method"] != "coral")
    assert capsys.readouterr().out.endswith((output / "results.md").read_text() + "\n")

    kept = (output / "records.jsonl").read_text()
    spoiled = [json.loads(line) for line in kept.splitlines()]
    spoiled[-1]["text"]["tokens"][0] += 1
    (output / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in spoiled))
    assert run(8, f"{HF},plain,coral") == 1
    assert "not the text of plain decoding: coral" in capsys.readouterr().err
    assert run(9, "plain") == 2
    assert "other settings" in capsys.readouterr().err
