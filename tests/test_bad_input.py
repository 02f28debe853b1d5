"""Whatever goes wrong: one sentence on standard error, exit code 2, and nothing half-written."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tiny_pair import save_target
from transformers import AutoTokenizer

from coral.data.prepare import PrepareConfig, prepare
from coral.drafters import checkpoint
from coral.errors import CoralError
from coral.files import atomic_directory, atomic_text
from coral.locks import locked


def record(i: int) -> str:
    said = [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": f"say {i}"}]
    return json.dumps({"messages": said}) + "\n"


@pytest.fixture(scope="module")
def place(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Things to name on a command line, good and bad."""
    here = tmp_path_factory.mktemp("place")
    (here / "good.jsonl").write_text("".join(map(record, range(6))))
    (here / "unusable.jsonl").write_text('{nonsense\n{"messages": []}\n')
    (here / "suite.jsonl").write_text('{"id": 1, "turns": ["hi"]}\n{"id": 2, "turns": ["ho"]}\n')
    (here / "not_a_suite.jsonl").write_text('{"id": 1, "turns": ["hi"]}\n{"id": 2}\n')
    (here / "typo.yaml").write_text("recipe: mine\nstep: 3\n")
    (here / "file").write_text("kept\n")
    (here / "full").mkdir()
    (here / "full" / "thesis.tex").write_text("kept\n")
    save_target(here / "large", vocab_size=300)
    tokenizer = AutoTokenizer.from_pretrained(models / "target")
    prepare([here / "good.jsonl"], tokenizer, here / "data", PrepareConfig(held_out=0))
    names = ("good.jsonl", "unusable.jsonl", "suite.jsonl", "not_a_suite.jsonl", "typo.yaml", "file", "full")
    named = {name.replace(".", "_"): here / name for name in (*names, "large", "data")}
    return named | {name: models / name for name in ("target", "drafter", "other")}


def message(result: Any) -> str:
    """The one sentence; everything else that a mistake must not do is checked here."""
    assert result.code == 2 and result.out == ""
    assert (
        result.err.startswith("coral: ") and result.err[-2:] in (".\n", "?\n") and result.err.count("\n") == 1
    )
    assert not re.search(r"[.!?] [A-Z]|Traceback|Errno|None", result.err), result.err
    return result.err


def nothing_left(directory: Path) -> bool:
    return not contents(directory) and not any(path.name[0] == "." for path in directory.iterdir())


GENERATE = "generate --target {target} "
TRAIN = "train --target {target} --data {data} --output {out} --updates 1 "
BENCH = (
    "bench --backend transformers --target {target} --suite {suite_jsonl} --output {out} --max-new-tokens 4 "
)
PREPARE = "data prepare {good_jsonl} --tokenizer {target} --output {out} --held-out 1 "
REGENERATE = "data regenerate {good_jsonl} --target {target} --output {out}.jsonl --max-new-tokens 4 "
FEATURES = "data features {data} --target {target} --output {out} --shard-rows 2 "
MISTAKES = {
    # command line
    "generate --tempature 1 hi": "no such option: --tempature",
    "generate --temperature hot hi": "invalid value for '--temperature'",
    "generate --max-new-tokens 0 hi": "invalid value for '--max-new-tokens'",
    "generate hi --seed": "'--seed' requires an argument",
    "generat hi": "no such command 'generat', did you mean 'generate'; see `coral --help`",
    "train": "missing option '--data'; see `coral train --help`",
    "--threads 0 generate hi": "invalid value for '--threads'",
    # files and names
    "generate --target /nowhere/at/all hi": "there is no target directory /nowhere/at/all; check the path",
    "generate --target {full} hi": "holds neither config.json nor a GGUF file",
    "generate --target no/such hi": "check the name",
    GENERATE + "--drafter /nowhere hi": "there is no drafter directory /nowhere; check the path",
    GENERATE + "--drafter {full} hi": "is not a CORAL drafter",
    "generate --target {other} --drafter {drafter} hi": "has other weights (its LM head's cosine with theirs",
    "generate --target {large} --drafter {drafter} hi": "has vocab_size 270, but the target",
    "data prepare /nowhere.jsonl --tokenizer {target} --output {out}": "/nowhere.jsonl does not exist; name",
    "data prepare {good_jsonl} --tokenizer /nowhere --output {out}": "no tokenizer directory /nowhere; check",
    REGENERATE.replace("{good_jsonl}", "/nowhere.jsonl"): "/nowhere.jsonl does not exist; name",
    TRAIN.replace("{data}", "/nowhere"): "/nowhere does not exist; make it with `coral data prepare`",
    TRAIN.replace("{data}", "{full}"): "is no prepared data directory",
    TRAIN
    + "--recipe medusa": "there is no recipe 'medusa'; give one of coral, coral3, eagle2, eagle3, hass, or",
    BENCH.replace("{suite_jsonl}", "mtbench"): "'mtbench' is neither a file nor one of mt_bench, humaneval",
    BENCH.replace("{suite_jsonl}", "{not_a_suite_jsonl}"): "line 2 must hold",
    BENCH + "--drafter =": "cannot read --drafter '='; write it as DRAFTER or NAME=DRAFTER",
    BENCH + "--drafter a=": "cannot read --drafter 'a='",
    BENCH + "--drafter nowhere": "there is no drafter directory nowhere; check the path",
    BENCH + "--drafter mine=/nowhere": "there is no drafter directory /nowhere; check the path",
    BENCH + "--drafter {drafter}+odd": "there is no drafter directory",
    BENCH + "--drafter {drafter} --drafter {drafter}": "two drafters are called 'drafter'; name them apart",
    BENCH + "--drafter hf_generate": "there is no drafter directory hf_generate",
    BENCH + "--drafter plain={drafter}": "'plain' is reserved",
    # content
    GENERATE + "[]": "the prompt is empty; write something",
    GENERATE + "[long]": "the prompt has 604 tokens, but the target's context is 512; shorten it",
    "data prepare {unusable_jsonl} --tokenizer {target} --output {out}": "2 records dropped: 1 x unreadable "
    "JSON",
    "data prepare {unusable_jsonl} --tokenizer {target} --output {out} --preview": "usable conversation: 2",
    REGENERATE.replace(
        "{good_jsonl}", "{unusable_jsonl}"
    ): "no conversation to regenerate; name files with user turns: 2 records",
    PREPARE.replace("--held-out 1", "--held-out 60"): "lower held_out (--held-out) or add data",
    TRAIN.replace("{target}", "{large}") + "--set batch_size=0": "batch_size must be at least 1",
    # values and keys
    GENERATE + "--temperature -1 hi": "temperature is -1.0, but it must be 0 or more",
    GENERATE + "--temperature nan hi": "temperature is nan",
    GENERATE + "--temperature 1e-38 hi": "temperature is 1e-38, which float32 cannot divide by; use 0",
    REGENERATE + "--temperature 1e-38": "temperature is 1e-38",
    REGENERATE.replace(
        "--target {target}", "--endpoint http://me:secret@host/v1?key=x"
    ): "cannot read --endpoint 'host/v1'; write it",
    GENERATE + "--temperature -1": "temperature is -1.0",
    GENERATE + "--top-p 0 hi": "top_p is 0.0",
    GENERATE + "--raw": "give one as the prompt",
    GENERATE + "--stop= hi": "a stop string is empty",
    GENERATE + "--tree 1,x hi": "write it as TOP_K,MAX_DEPTH,NUM_NODES",
    GENERATE + "--tree 4,4,15,2 hi": "min_gain is 2.0, but it must be from 0 to 1",
    GENERATE + "--tree 0,1,1 hi": "the draft tree's top_k is 0, but it must be a whole number from 1 to 256",
    GENERATE + "--tree 2,3,9999999999999999 hi": "num_nodes is 9999999999999999",
    GENERATE + "--dtype float8 hi": "use auto, float32, bfloat16, float16 or packed",
    GENERATE + "--device teapot hi": "device string: teapot; check its files and the device",
    TRAIN + "--set loss.regresion=1": "unknown key loss.regresion; did you mean loss.regression",
    TRAIN + "--set steps=many": "steps",
    TRAIN + "--set steps": "write it as key=value",
    TRAIN + "--recipe {typo_yaml}": "unknown key step; did you mean steps",
    BENCH + "--deepen 1": "deepen",
    REGENERATE + "--temperature -1": "temperature is -1.0",
    FEATURES + "--shard 3/2": "cannot read --shard '3/2'; write it as I/N",
    FEATURES + "--store float16": "cannot be stored as 'float16'; use bfloat16, float32, fp8",
    # outputs
    FEATURES.replace("{out}", "{file}"): "is a file, but a directory is to be written there; choose another",
    FEATURES.replace("{out}", "{full}"): "holds other files; choose an empty or new directory",
    PREPARE.replace("{out}", "{file}"): "is a file, but a directory is to be written there; choose another",
    PREPARE.replace("{out}", "{full}"): "choose another output",
    TRAIN.replace("{out}", "{file}"): "is a file, but a directory is to be written there; choose another",
    TRAIN.replace("{out}", "{full}"): "holds files that are not a drafter; choose an empty or new directory",
    BENCH.replace("{out}", "{file}"): "choose another --output",
    REGENERATE.replace("{out}.jsonl", "{file}"): "choose a file of its own that ends in .jsonl",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_sentence(coral, place: dict[str, Path], tmp_path: Path, line: str) -> None:
    words = line.format(**place, out=tmp_path / "out").split()
    result = coral(*({"[]": " ", "[long]": "x" * 600}.get(word, word) for word in words))
    assert MISTAKES[line] in message(result)
    assert nothing_left(tmp_path)
    assert place["file"].read_text() == "kept\n" and [*place["full"].iterdir()] == [
        place["full"] / "thesis.tex"
    ]


def test_data_of_another_target_is_refused(coral, place: dict[str, Path], tmp_path: Path) -> None:
    """Stops training on ids that mean other words."""
    info = json.loads((place["data"] / "coral.json").read_text())
    (place["data"] / "coral.json").write_text(json.dumps(info | {"vocabulary": "0" * 16}))
    line = TRAIN.format(**place, out=tmp_path / "out")
    assert "prepare the data with the target's own tokenizer" in message(coral(*line.split()))
    (place["data"] / "coral.json").write_text(json.dumps(info))


def test_a_bad_line_is_dropped_and_counted(coral, place: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "c.jsonl"
    source.write_text(
        record(0) + "{nonsense\n" + record(1) + '{"messages": [{"role": "robot"}]}\n' + record(2)
    )
    line = PREPARE.replace("{good_jsonl}", str(source)).format(**place, out=tmp_path / "out")
    result = coral(*line.split())
    assert result.code == 0 and "2 examples" in result.out and "2 records dropped" in result.out
    assert (
        f"{source}:2: unreadable JSON" in result.out and f"{source}:4: 'role' of a turn is not" in result.out
    )


# ---------------------------------------------------------------------------------------- full disk, Ctrl-C


def contents(directory: Path) -> dict[str, bytes]:
    """All files but the log of a run, which may grow."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "metrics.jsonl")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.mark.parametrize("line", [TRAIN, PREPARE, BENCH, REGENERATE, FEATURES])
def test_a_full_disk_leaves_what_was_there(
    coral, place: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """Stops a checkpoint that is lost because the next one did not fit."""
    words = line.format(**place, out=tmp_path / "out").split()
    if line in (TRAIN, PREPARE):
        assert coral(*words).code == 0
    before = contents(tmp_path)

    def full(self: Path, *_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        patch.setattr(Path, "write_text", full)
        open_ = Path.open
        patch.setattr(Path, "open", lambda p, mode="r", **k: full(p) if mode in "aw" else open_(p, mode, **k))
        result = coral(*words, *(("--updates", 2) if line is TRAIN else ()))
    assert result.code == 2 and result.out == "" and "Traceback" not in result.err
    assert "No space left on device" in result.err and result.err.splitlines()[-1].startswith("coral: ")
    assert contents(tmp_path) == before and not any(path.name[0] == "." for path in tmp_path.iterdir())
    assert coral(*words, *(("--updates", 2) if line is TRAIN else ())).code == 0  # with room again, it works


@pytest.mark.parametrize("line", [TRAIN, PREPARE, BENCH, REGENERATE, FEATURES])
def test_an_output_has_one_writer(coral, place: dict[str, Path], tmp_path: Path, line: str) -> None:
    """Stops two processes that write 90 lines for 45 records, each record twice, or metrics in two hands."""
    words = line.format(**place, out=tmp_path / "out").split()
    name = {REGENERATE: "out.jsonl", FEATURES: "out.1-of-1"}.get(line, "out")
    with ThreadPoolExecutor(1) as pool:  # another thread is another writer
        held = locked(tmp_path / name)
        pool.submit(held.__enter__).result()
        said = message(coral(*words))
        assert f"{name} is being written by process {os.getpid()} (" in said and "wait until it has" in said
        assert contents(tmp_path).keys() == {f".{name}.lock"}
        pool.submit(held.__exit__, None, None, None).result()
    assert coral(*words).code == 0 and not (tmp_path / f".{name}.lock").exists()


def test_heads_and_trees_have_one_writer(coral, place: dict[str, Path], tmp_path: Path) -> None:
    """Stops a tree of a head that is made anew meanwhile, and a head for a drafter in training."""
    shutil.copytree(place["drafter"], tmp_path / "d")
    before = contents(tmp_path)
    rest = ("--target", place["target"])
    with ThreadPoolExecutor(1) as pool:
        held = locked(tmp_path / "d")
        pool.submit(held.__enter__).result()
        for words in (("tune", tmp_path / "d"), ("train-head", tmp_path / "d", "--data", place["data"])):
            assert "d is being written by process" in message(coral(*words, *rest))
        pool.submit(held.__exit__, None, None, None).result()
    assert contents(tmp_path) == before


def test_preparing_anew_keeps_what_others_put_there(coral, place: dict[str, Path], tmp_path: Path) -> None:
    """Stops an output from taking notes of other people with it, and rows of the older data from staying."""
    words = PREPARE.format(**place, out=tmp_path / "out").split()
    assert coral(*words).code == 0
    first = contents(tmp_path)
    (tmp_path / "out" / "NOTES.md").write_text("mine")
    (tmp_path / "out" / "data-00007-of-00008.arrow").write_text("older rows")
    assert coral(*words).code == 0
    assert contents(tmp_path).keys() == {*first, "out/NOTES.md"}


def test_a_failed_rename_brings_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops the moment between two renames from losing both directories, Ctrl-C included."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("kept")
    monkeypatch.setattr("coral.files._exchange", lambda one, other: False)
    rename = Path.rename
    for error, raised in (
        (OSError(errno.EIO, "broken"), CoralError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):

        def broken(self: Path, to: Path, error: BaseException = error) -> Path:
            if (self / "new").exists():
                raise error
            return rename(self, to)

        monkeypatch.setattr(Path, "rename", broken)
        with pytest.raises(raised), atomic_directory(tmp_path / "out") as aside:
            (aside / "new").write_text("lost")
        assert contents(tmp_path) == {"out/old": b"kept"} and len([*tmp_path.iterdir()]) == 1


def test_a_text_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(CoralError, match="choose another output"):
        atomic_text(tmp_path / "file" / "results.json", "{}")
    assert contents(tmp_path) == {"file": b"kept"}


def interrupt_after(monkeypatch: pytest.MonkeyPatch, name: str, calls: int) -> None:
    """Ctrl-C at a call of the function of this name, after so many that went well."""
    module, _, function = name.rpartition(".")
    real, made = getattr(import_module(module), function), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        if len(made) > calls:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(name, interrupted)


@pytest.mark.parametrize(
    ("line", "function", "calls"),
    [
        (GENERATE + "hi", "coral.api.LLM", 0),
        (GENERATE + "hi", "coral.cli.chat.Detokenizer", 0),
        (PREPARE, "coral.data.prepare._truncate", 2),
        (REGENERATE + "--batch-size 2", "coral.decoding.batch.write_padded", 1),
        (FEATURES, "coral.data.write_shards.feature_batch", 1),
        (TRAIN, "coral.training.run.feature_batch", 0),
        (BENCH, "coral.bench.texts.verdict_of", 3),
    ],
)
def test_ctrl_c_leaves_nothing_half_written(
    coral, place: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    line: str, function: str, calls: int,
) -> None:  # fmt: skip
    """Stops a traceback, and an output that the same command cannot go on from."""
    words = line.format(**place, out=tmp_path / "out").split()
    with monkeypatch.context() as patch:
        interrupt_after(patch, function, calls)
        result = coral(*words)
    last = "coral: stopped, with nothing left half-written; run the same command to go on or to start again."
    assert result.code == 2 and "Traceback" not in result.err
    assert result.err.splitlines()[-1] == last
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
    if line == TRAIN:
        checkpoint.load(tmp_path / "out")
    if line == BENCH:
        assert len(json.loads((tmp_path / "out" / "results.json").read_text())["rows"]) > 0
    assert coral(*words).code == 0


def test_a_signal_ends_training_after_the_update(place: dict[str, Path], tmp_path: Path) -> None:
    """As a process: SIGINT as the terminal sends it, and the number of threads as torch sees it."""
    line = TRAIN.replace("--updates 1", "--updates 100000").format(**place, out=tmp_path / "out")
    words = ["--threads", "1", *line.split(), "--set", "reports.log_every=1", "--set", "batch_size=2"]
    script = (
        "import atexit, sys\n"
        "from coral.cli.main import main\n"
        "assert 'torch' not in sys.modules\n"
        "atexit.register(lambda: print('threads', sys.modules['torch'].get_num_threads()))\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "3"}  # which --threads overrides
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=environment) as process:
        assert process.stderr is not None
        said = [process.stderr.readline()]
        while "update 3 " not in said[-1] and said[-1]:
            said.append(process.stderr.readline())
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=120)
    text = "".join(said) + rest
    assert process.returncode == 2 and out == "threads 1\n", text
    stopped = re.findall(r"stopped at update (\d+); run the same command to go on", text)
    assert len(stopped) == 1 and "Traceback" not in text and "Loading weights" not in text
    assert checkpoint.read_config(tmp_path / "out")["metrics"]["updates"] == int(stopped[0]) >= 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
