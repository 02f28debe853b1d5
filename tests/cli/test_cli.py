"""Every command as a person types it, on tiny models: what it prints, what it writes, how it ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tiny_tokenizer import EOT

import coral as library
from coral.cli.main import app
from coral.data import prepared
from coral.data.features import FeatureBatch
from coral.data.prepare import PrepareConfig, prepare
from coral.drafters import checkpoint
from coral.drafters.heads import store as heads
from coral.drafters.heads.static import StaticHead
from coral.target.target import Target
from coral.training import head_loop, router
from coral.tree import TreeSize

# Every option of every command. A new one is a promise to keep: it is added here with a reason to exist.
OPTIONS = {
    "": {"--threads"},
    "generate": {
        "--target", "--drafter", "--temperature", "--top-p", "--top-k", "--seed", "--max-new-tokens",
        "--stop", "--chat", "--raw", "--stats", "--mark", "--dtype", "--device", "--tree", "--coupled",
        "--no-coupled", "--backend", "--head", "--fallback", "--no-fallback", "--revision",
        "--trust-remote-code",
    },
    "demo": {"--max-new-tokens", "--dtype", "--tree"},
    "data": set(),
    "data prepare": {
        "--tokenizer", "--output", "--max-length", "--pack", "--held-out", "--limit", "--last-turn-only",
        "--preview", "--seed", "--revision", "--trust-remote-code",
    },
    "data regenerate": {
        "--output", "--target", "--temperature", "--max-new-tokens", "--batch-size", "--endpoint", "--model",
        "--concurrency", "--retries", "--timeout", "--api-key-env", "--limit", "--max-turns",
        "--keep-unfinished", "--drop-unfinished", "--seed", "--dtype", "--device", "--revision",
        "--trust-remote-code",
    },
    "data features": {
        "--output", "--target", "--layers", "--store", "--shard-rows", "--batch-size", "--shard", "--dtype",
        "--device", "--revision", "--trust-remote-code",
    },
    "train": {
        "--data", "--output", "--target", "--recipe", "--set", "--minutes", "--updates", "--resume",
        "--no-resume", "--tracker", "--dtype", "--device", "--device-map", "--shard-target", "--revision",
        "--trust-remote-code",
    },
    "train-head": {
        "--data", "--target", "--kind", "--groups", "--active", "--grouping", "--core", "--updates", "--size",
        "--rank", "--rescored", "--batches", "--dtype", "--device", "--seed", "--revision",
        "--trust-remote-code",
    },
    "tune": {
        "--target", "--data", "--prompts", "--max-new-tokens", "--temperature", "--head", "--backend",
        "--deepen", "--write", "--no-write", "--dtype", "--device", "--seed", "--revision",
        "--trust-remote-code",
    },
    "serve": {
        "--target", "--drafter", "--host", "--port", "--api-key", "--name", "--max-batch", "--memory-gb",
        "--queue", "--max-tokens", "--dtype", "--device", "--tree", "--coupled", "--no-coupled", "--backend",
        "--head", "--fallback", "--no-fallback", "--revision", "--trust-remote-code",
    },
    "convert": {"--revision", "--dtype"},
    "cache": {"--clear"},
    "push": {
        "--private", "--revision", "--message", "--license", "--base-model", "--data-note", "--bench",
        "--dry-run",
    },
    "bench": {
        "--output", "--target", "--drafter", "--suite", "--gate", "--batch", "--limit", "--deepen", "--dtype",
        "--temperature", "--uncoupled", "--peers", "--no-peers", "--assistant", "--backend", "--head",
        "--fallback", "--no-fallback", "--max-new-tokens", "--ignore-eos", "--tree", "--note", "--seed",
        "--device",
    },
    "bench compare": set(),
    "export": {"--to", "--head", "--output", "--target", "--dtype", "--revision", "--trust-remote-code"},
    "import": {"--target", "--output", "--revision", "--trust-remote-code"},
}  # fmt: skip

# What every row of results.json has.
ROW = {
    "kind", "drafter", "suite", "temperature", "dtype", "tokens", "cycles", "seconds", "tokens_per_second",
    "speedup", "speedup_over_hf", "tau", "tau_unrepeated", "repeat_share", "acceptance_by_depth",
    "draft_share", "verify_share", "equal", "near_tie", "wrong", "identical", "c", "v", "ceiling",
}  # fmt: skip


def conversations(path: Path, count: int = 8) -> Path:
    said = [
        [
            {"role": "user", "content": f"ask {i}"},
            {"role": "assistant", "content": f"say {i} " + "the " * (i % 3)},
        ]
        for i in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in said))
    return path


@pytest.fixture(scope="module")
def data(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    source = conversations(directory / "c.jsonl")
    target = Target.load(models / "target")
    prepare([source], target.tokenizer, directory / "prepared", PrepareConfig(held_out=1))
    return directory / "prepared"


@pytest.mark.parametrize("code", ["import coral", "from coral.cli.main import app; app(['--help'])"])
def test_help_and_import_load_nothing_large(code: str) -> None:
    """Stops an `import coral` or a help text that waits seconds for torch."""
    large = {"torch", "transformers", "datasets", "numpy", "pydantic", "rich.console", "huggingface_hub"}
    told = f"import atexit, sys\natexit.register(lambda: print({large} & sys.modules.keys()))\n"
    done = subprocess.run([sys.executable, "-c", told + code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


# ------------------------------------------------------------------------------------------------ options


def commands(command: typer.core.TyperGroup, prefix: str = "") -> dict[str, set[str]]:
    """Option names of a command and of all below it."""
    named = (param for param in command.params if param.param_type_name == "option")
    found = {prefix: {opt for param in named for opt in (*param.opts, *param.secondary_opts)} - {"--help"}}
    for name, below in getattr(command, "commands", {}).items():
        found |= commands(below, f"{prefix} {name}".strip())
    return found


def test_options_are_frozen() -> None:
    """Stops an option that slips in, or a name that people's scripts use and that is gone."""
    assert commands(typer.main.get_command(app)) == OPTIONS


@pytest.mark.parametrize("command", OPTIONS)
def test_help_explains_every_option(coral, command: str) -> None:
    result = coral(*command.split(), "--help")
    assert result.code == 0 and result.err == ""
    assert all(option in result.out for option in OPTIONS[command])


@pytest.mark.parametrize("group", [(), ("data",)])
def test_a_bare_group_shows_its_help(coral, group: tuple[str, ...]) -> None:
    result = coral(*group)
    assert result.code == 2 and "Commands:" in result.out and result.err == ""


def test_help_waits_for_no_library() -> None:
    """Stops `coral --help` from importing torch, which takes seconds; the one command run as a process."""
    command = [sys.executable, "-X", "importtime", "-m", "coral", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "generate" in done.stdout
    imported = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, re.M))
    assert "coral.cli.main" in imported
    assert not imported & {"torch", "transformers", "numpy", "datasets", "accelerate", "huggingface_hub"}


# --------------------------------------------------------------------------------------------------- data


def test_prepare(coral, models: Path, tmp_path: Path) -> None:
    source = conversations(tmp_path / "c.jsonl")
    common = ("data", "prepare", source, "--tokenizer", models / "target", "--held-out", 1)
    assert "missing option '--output'" in coral(*common).err
    for more in ((), ("--output", tmp_path / "one")):
        result = coral(*common, "--preview", *more)
        assert result.code == 0 and "[[say 0 <|eot|>]]" in result.out and not (tmp_path / "one").exists()

    result = coral(*common, "--output", tmp_path / "one")
    assert (
        result.code == 0
        and result.out.startswith("7 examples in 7 rows")
        and "1 prompts held out" in result.out
    )
    result = coral(*common, "--output", tmp_path / "packed", "--pack", "--max-length", 100)
    assert result.code == 0 and "7 examples in 2 rows" in result.out
    assert prepared.load(tmp_path / "packed").info["packed"]


def test_regenerate_goes_on_where_it_was_stopped(coral, models: Path, tmp_path: Path) -> None:
    source, output = conversations(tmp_path / "c.jsonl"), tmp_path / "written.jsonl"
    command = ("data", "regenerate", source, "--output", output, "--target", models / "target")
    command += ("--max-new-tokens", 8, "--batch-size", 2)
    result = coral(*command)
    assert result.code == 0 and "8 records = 8 written + 0 skipped + 0 failed" in result.out
    whole = output.read_text()
    temperatures = [json.loads(line)["regenerated"]["temperature"] for line in whole.splitlines()]
    assert sorted(temperatures) == [0.0] * 4 + [0.8] * 4
    output.write_text(whole[: len(whole) // 2])  # as if it had been killed within a line
    result = coral(*command)
    assert result.code == 0 and output.read_text() == whole
    assert coral("data", "prepare", output, "--tokenizer", models / "target", "--output", tmp_path / "p",
                 "--held-out", 1).code == 0  # fmt: skip


# -------------------------------------------------------------------------------------------------- train


def test_train_then_go_on(coral, models: Path, data: Path, tmp_path: Path) -> None:
    """Stops a drafter that does not load, and a run that starts again instead of going on."""
    output = tmp_path / "drafter"
    command = ("train", "--data", data, "--target", models / "target", "--output", output)
    command += ("--set", "batch_size=2", "--set", "reports.log_every=1")
    result = coral(*command, "--updates", 2)
    assert result.code == 0 and "finished after update 2" in result.err
    assert "top-1" in result.err and "acceptance length: chain" in result.err
    with (output / "coral" / "training" / "metrics.jsonl").open("a") as torn:
        torn.write('{"upda')  # as a full disk would leave it
    result = coral(*command, "--updates", 3)
    assert result.code == 0 and "going on after update 2" in result.err
    lines = (output / "coral" / "training" / "metrics.jsonl").read_text().splitlines()
    assert [line["update"] for line in map(json.loads, lines) if "loss" in line] == [1, 2, 3]
    checkpoint.load(output, Target.load(models / "target"))
    asked = ("generate", "--target", models / "target", "--max-new-tokens", 12, "hi")
    assert coral(*asked, "--drafter", output).out == coral(*asked).out


def test_train_head_then_use_it(
    coral, models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops a head that changes the text, one that is never used, and a stop that leaves half a head."""
    drafter = tmp_path / "drafter"
    shutil.copytree(models / "drafter", drafter)
    asked = ("generate", "--target", models / "target", "--drafter", drafter, "--max-new-tokens", 12, "hi")
    assert "coral train-head" in coral(*asked, "--head", "routed").err
    command = ("train-head", drafter, "--data", data, "--target", models / "target", "--groups", 4)
    command += ("--active", 1, "--core", 6, "--updates", 3)
    assert "ask for at least one of --updates" in coral(*command, "--updates", 0).err
    recall, before = router.group_recall, {path for path in tmp_path.rglob("*") if path.is_file()}

    def interrupted(*given: torch.Tensor) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        return recall(*given)

    with monkeypatch.context() as patched:
        patched.setattr(router, "group_recall", interrupted)
        assert "nothing left half-written" in coral(*command).err
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    made = coral(*command)
    assert made.code == 0 and "1 of 4 groups beside a core of 6 ids, recall by draft step" in made.out
    assert "100%  update 3  loss" in made.err
    texts = {coral(*asked, "--head", head).out for head in ("auto", "routed", "full")}
    command = ("bench", "--target", models / "target", "--drafter", f"mine={drafter}", "--suite", data)
    measured = coral(
        *command, "--max-new-tokens", 6, "--backend=transformers", "--no-peers", "--output", tmp_path / "out"
    )
    assert "routed head of mine: 1 of 4 groups beside a core of 6 ids hold" in measured.out
    kept = json.loads((tmp_path / "out" / "results.json").read_text())["routed_heads"]
    assert 0 < kept["float32"]["mine"]["recall"][0] < 1
    assert len(texts) == 1 and texts.pop().strip()


def test_heads_without_a_router(
    coral, models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops a head made from the wrong options, options silently left out, a text that changes, a token map
    that an engine does not read, and tuning that writes when it is stopped or is left out.
    """
    drafter = tmp_path / "drafter"
    shutil.copytree(models / "drafter", drafter)
    command = ("train-head", drafter, "--data", data, "--target", models / "target")
    assert "use routed, static, low_rank" in coral(*command, "--kind", "odd").err
    assert "--rank belongs to --kind low_rank" in coral(*command, "--kind", "static", "--rank", 4).err
    assert "above the hidden size" in coral(*command, "--kind", "low_rank", "--rank", 4000).err
    made = coral(*command, "--kind", "static", "--size", 12)
    assert "static head: 12 ids" in made.out
    (token_map,) = re.findall(r"token map for SGLang .*: (.*): ", made.out)
    ids = torch.load(token_map, weights_only=True)
    assert [*map(type, ids)] == [int] * 12 and len({*ids}) == 12 and EOT in ids
    loaded = heads.load(drafter, Target.load(models / "target"))
    assert isinstance(loaded, StaticHead) and loaded.ids.tolist() == ids
    made = coral(*command, "--kind", "low_rank", "--rank", 3, "--rescored", 5, "--batches", 2)
    assert "low-rank head: rank 3 of" in made.out and "tuned" not in made.out
    before = (drafter / "coral" / "heads" / "low_rank.safetensors").read_bytes()
    tuning = (*command, "--kind", "low_rank", "--rank", 3, "--rescored", 5, "--batches", 2, "--updates", 3)
    stopped, batches = head_loop.feature_batch, []

    def interrupted(*given: object) -> FeatureBatch:
        batches.append(given)
        if len(batches) == 2:
            signal.raise_signal(signal.SIGINT)
        return stopped(*given)

    with monkeypatch.context() as patched:
        patched.setattr(head_loop, "feature_batch", interrupted)
        assert "nothing left half-written" in coral(*tuning).err
    assert len(batches) == 2
    assert (drafter / "coral" / "heads" / "low_rank.safetensors").read_bytes() == before
    made = coral(*tuning)
    assert "tuned in 3 updates" in made.out and "100%  update 3  loss" in made.err
    assert (drafter / "coral" / "heads" / "low_rank.safetensors").read_bytes() != before
    assert (drafter / "coral" / "heads" / "own").read_text() == "low_rank\n"
    asked = ("generate", "--target", models / "target", "--drafter", drafter, "--max-new-tokens", 12, "hi")
    texts = {
        coral(*asked, "--head", head).out for head in ("auto", "static", "low_rank", "full", "in_context")
    }
    texts.add(coral(*asked, "--drafter", f"{drafter}+in_context+ngram").out)
    texts.add(coral(*asked, "--drafter", f"{drafter}+static+ngram").out)
    assert len(texts) == 1 and texts.pop().strip()
    assert "no routed head" in coral(*asked, "--drafter", f"{drafter}+routed+ngram").err


def test_a_limit_of_the_command_line_replaces_epochs(coral, models: Path, tmp_path: Path) -> None:
    """Stops `--updates 1000` from ending after the few updates of a recipe's epochs."""
    recipe = tmp_path / "mine.yaml"
    source = conversations(tmp_path / "c.jsonl", 6)
    prepare([source], Target.load(models / "target").tokenizer, tmp_path / "data", PrepareConfig(held_out=0))
    recipe.write_text("recipe: mine\nsteps: 1\nbatch_size: 3\nlimits: {epochs: 1}\n")
    common = (
        "train",
        "--data",
        tmp_path / "data",
        "--target",
        models / "target",
        "--recipe",
        recipe,
        "--updates",
        4,
    )
    made = {}
    for name, more in {"instead": (), "asked for": ("--set", "limits.epochs=1")}.items():
        assert coral(*common, "--output", tmp_path / name, *more).code == 0
        made[name] = checkpoint.read_config(tmp_path / name)["metrics"]["updates"]
    assert made == {"instead": 4, "asked for": 2}


# ----------------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("options", [(), ("--temperature", 1, "--seed", 3, "--top-p", 0.9), ("--raw",)])
def test_the_text_is_the_same_whatever_drafts(coral, models: Path, options: tuple[object, ...]) -> None:
    """Stops text that depends on the drafter, and a terminal that changes it: tabs, control characters."""
    command = ("generate", "--target", models / "target", "--max-new-tokens", 24, *options, "the the the")
    plain = coral(*command)
    why = "runs as transformers' own code, which is slower: its sizes are no multiples of 16\n"
    assert plain.code == 0 and plain.err == why
    assert coral(*command, "--backend", "transformers") == plain._replace(err="")
    for drafter in ("ngram", models / "drafter"):
        for more in ((), ("--tree", "2,3,5", "--no-coupled")):
            assert coral(*command, "--drafter", drafter, *more) == plain
    asked = {"temperature": 1.0, "seed": 3, "top_p": 0.9} if len(options) > 1 else {"chat": not options}
    pair = library.load(models / "target")
    assert plain.out == pair.generate("the the the", max_new_tokens=24, **asked) + "\n"


def test_seeds_differ(coral, models: Path) -> None:
    command = ("generate", "--target", models / "target", "--temperature", 1, "--max-new-tokens", 12, "hi")
    assert len({coral(*command, "--seed", seed).out for seed in (0, 1, 1, 2)}) == 3


def test_stop_strings(coral, models: Path) -> None:
    """Stops a stop string that is printed, wholly or in part, before it is found."""
    command = (
        "generate",
        "--target",
        models / "target",
        "--max-new-tokens",
        40,
        "--drafter",
        "ngram",
        "tell me",
    )
    text = coral(*command).out
    stop = text[11:14]
    assert coral(*command, "--stop", "absent", "--stop", stop).out == text[: text.index(stop)] + "\n"


def test_stats_and_marks(coral, models: Path) -> None:
    """Stops marks on tokens that the target wrote itself, and statistics within the text."""
    command = ("generate", "--target", models / "target", "--max-new-tokens", 60, "1 2 3")
    command += ("--backend", "transformers")
    text = coral(*command).out
    result = coral(*command, "--stats", "--drafter", "ngram", "--mark", "--no-fallback")
    found = re.fullmatch(
        r"float32, transformers: load [\d.]+ s, first token [\d.]+ s, then \d+ tokens in [\d.]+ s "
        r"\([\d.]+ tokens/s\); (\d+) cycles "
        r"\(\d+ of them plain steps\), tau ([\d.]+), (\d+) of \d+ draft tokens accepted, drafting \d+%, "
        r"verification \d+% of the time, tree 2,6,10,0.1 \(default\)\n", result.err)  # fmt: skip
    assert found is not None
    cycles, accepted = int(found[1]), int(found[3])
    assert accepted > 0 and cycles + accepted >= 60 and float(found[2]) > 1
    brackets = str.maketrans("", "", "[]")
    assert result.out != text and result.out.translate(brackets) == text.translate(brackets)
    assert coral(*command, "--mark").out == text
    alone = coral(*command, "--stats").err
    assert "--drafter ngram" in alone and "tree" not in alone and "draft " not in alone and "tau" not in alone


def test_chat_keeps_the_conversation_and_new_forgets_it(coral, models: Path) -> None:
    """Stops a second turn that reads stale keys and values, and a /new that remembers."""
    command = ("generate", "--target", models / "target", "--max-new-tokens", 16)
    command += ("--backend", "transformers")
    pair = library.load(models / "target")

    def answer(*said: str) -> str:
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
        return pair.generate(messages, max_new_tokens=16)

    first = answer("one")
    second = answer("one", first, "and two")
    for drafter in ("plain", "ngram", models / "drafter"):
        result = coral(*command, "--drafter", drafter, stdin="one\n\nand two\n/new\none\n")
        assert result.code == 0 and result.err == ""
        head, _, said = result.out.partition("\n")
        assert head == "Write a message; /help lists commands, Ctrl-C stops an answer, Ctrl-D ends."
        assert said == f"> {first}\n> > {second}\n> > {first}\n> \n"


def test_chat_commands(coral, models: Path) -> None:
    """Stops a command that is answered as a message, and a path that is taken for a command."""
    command = ("generate", "--target", models / "target", "--max-new-tokens", 4)
    result = coral(*command, stdin="/help\n/rest\n/quit\nhi\n")
    told = "/reset starts over, /quit leaves (or Ctrl-D); anything else is a message."
    first, second = result.out.replace("\n", " ").split(told)[:2]
    assert result.code == 0 and first.endswith("> ") and second.endswith("> /rest is no command. ")
    for leave in ("/quit", "/exit", "/bye", "exit", "quit"):
        assert coral(*command, stdin=f"{leave}\nhi\n").out.endswith("ends.\n> ")
    greeting = coral(*command, stdin="/etc/passwd\n").out
    assert greeting.endswith("> " + coral(*command, "/etc/passwd").out + "> \n")
    once = coral(*command, stdin="hi\n").out
    for reset in ("/reset", "/new", "/clear"):
        assert coral(*command, stdin=f"ho\n{reset}\nhi\n").out.endswith(once.partition("\n")[2])


def test_ctrl_c_stops_an_answer_and_twice_leaves(coral, models: Path, monkeypatch) -> None:
    """Stops the loss of a conversation with an answer that became too long."""
    command = ("generate", "--target", models / "target", "--drafter", "plain", "--max-new-tokens", 40)
    whole = coral(*command, "one").out.rstrip("\n")
    cycles, before, presses = library.LLM.cycles, signal.getsignal(signal.SIGINT), [1]

    def interrupted(pair: Any, state: Any) -> Any:
        for number, cycle in enumerate(cycles(pair, state)):
            for _ in range(presses[0] if number == 2 else 0):
                signal.raise_signal(signal.SIGINT)
            yield cycle

    monkeypatch.setattr(library.LLM, "cycles", interrupted)
    result = coral(*command, stdin="one\n/quit\n")
    said = result.out.partition("> ")[2].partition("\n")[0]
    assert result.code == 0 and "Stopped; Ctrl-C again leaves." in result.out
    assert said and whole.startswith(said) and len(said) < len(whole)
    presses[0] = 2
    result = coral(*command, stdin="one\ntwo\n")
    assert result.code == 2 and "stopped" in result.err and result.out.count("> ") == 1
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_output_that_is_not_utf8(toy: Path, encoding: str) -> None:
    """Stops a traceback in the middle of an answer, on a terminal that cannot show a character."""
    command = [
        sys.executable,
        "-m",
        "coral",
        "generate",
        "--target",
        str(toy / "target"),
        "--raw",
        "--max-new-tokens",
    ]
    done = subprocess.run(
        [*command, "9", "\u00e9 \u2192 \u65e5\u672c caf\u00e9"],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr and done.stdout.decode(encoding)


@pytest.mark.slow
def test_a_user_without_a_name_and_a_home(toy: Path, tmp_path: Path) -> None:
    """Stops a KeyError in a container that runs as a number."""
    (tmp_path / "sitecustomize.py").write_text(
        "import pwd\ndef none(uid): raise KeyError(uid)\npwd.getpwuid = none\n"
    )
    names = {"HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in names}
    paths = [str(tmp_path), str(Path(library.__file__).parents[1])]
    command = [
        sys.executable,
        "-m",
        "coral",
        "generate",
        "--target",
        str(toy / "target"),
        "--backend=transformers",
    ]
    done = subprocess.run(
        [*command, "--max-new-tokens", "3", "hi"],
        env={**environment, "PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert not (tmp_path / "~").exists()


def test_chat_survives_a_message_that_is_too_long(coral, models: Path) -> None:
    command = ("generate", "--target", models / "target", "--max-new-tokens", 4)
    result = coral(*command, stdin="x" * 600 + "\nhi\n")
    assert result.code == 0 and "context is 512; shorten it. /reset starts over." in " ".join(
        result.out.split()
    )
    assert result.out.endswith(coral(*command, "hi").out + "> \n")


# -------------------------------------------------------------------------------------------- bench, demo


def test_bench(coral, models: Path, tmp_path: Path) -> None:
    suite = tmp_path / "mine.jsonl"
    suite.write_text("".join(json.dumps({"id": i, "turns": [f"ask {i}"]}) + "\n" for i in range(3)))
    output = tmp_path / "out"
    result = coral("bench", "--target", models / "target", "--drafter", f"mine={models / 'drafter'}",
                   "--suite", suite, "--limit", 2, "--max-new-tokens", 6, "--temperature", 0,
                   "--temperature", 1, "--uncoupled", "--backend=transformers",
                   "--output", output)  # fmt: skip
    assert result.code == 0 and "HF prompt lookup" in result.out and "Traceback" not in result.err
    results = json.loads((output / "results.json").read_text())
    assert {"environment", "command", "commit", "rows"} <= set(results)
    assert results["command"].startswith("coral bench --target")
    assert all(set(row) >= ROW for row in results["rows"])
    assert {row["suite"] for row in results["rows"]} == {"mine", "all"}
    assert {row["drafter"] for row in results["rows"]} > {"plain", "mine", "ngram", "hf_generate"}
    assert all(row["wrong"] == 0 for row in results["rows"] if row["kind"] != "peer")
    assert (output / "results.md").read_text().count("\n| ") > 4
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")
    compared = coral("bench", "compare", "mine", "mine", output)
    assert compared.code == 0 and compared.out.splitlines()[0].startswith(
        "float32 T=0 mine: mine - mine: +0.00 tau [0.00, 0.00] over 2 prompts: too few to say; 1.00x"
    )
    assert len(compared.out.splitlines()) == 6  # T = 0, T = 1 coupled and not; the suite and `all`
    unknown = coral("bench", "compare", "mine", "yours", output)
    assert unknown.code == 2 and "known are plain, ngram, mine" in unknown.err
    assert "records.jsonl" in coral("bench", "compare", "mine", "ngram", tmp_path).err
    assert "--output" in coral("bench", "--limit", 1).err


def test_drafters_are_named_as_in_generate(coral, models: Path, tmp_path: Path) -> None:
    """Stops names that `coral generate` takes and a bench does not, and a second row of what is there."""
    suite, own, odd = tmp_path / "mine.jsonl", models / "drafter", tmp_path / "a=b" / "odd"
    suite.write_text('{"id": 1, "turns": ["ask"]}\n')
    shutil.copytree(own, odd)
    command = ("bench", "--target", models / "target", "--suite", suite, "--max-new-tokens", 6,
               "--temperature", 0, "--temperature", 1, "--uncoupled", "--backend=transformers")  # fmt: skip

    def run(output: str, *options: object) -> dict[str, list[tuple[str, float, bool]]]:
        """What was measured: kind, temperature and whether coupled, by name."""
        result = coral(*command, "--output", tmp_path / output, *options)
        assert result.code == 0, result.err
        rows = json.loads((tmp_path / output / "results.json").read_text())["rows"]
        found: dict[str, list[tuple[str, float, bool]]] = {}
        for row in (row for row in rows if row["suite"] == "all"):
            found.setdefault(row["drafter"], []).append((row["kind"], row["temperature"], row["coupled"]))
        return found

    alone = run("alone", "--no-peers", "--drafter", "ngram", "--drafter", "plain")
    once = [(0, False), (1, False)]
    assert alone == {
        name: [(kind, *at) for at in once] for name, kind in {"plain": "plain", "ngram": "peer"}.items()
    }
    trees = json.loads((tmp_path / "alone" / "results.json").read_text())["trees"]["float32"]
    asked = ("generate", "hi", "--target", models / "target", "--drafter", "ngram", "--stats")
    assert (
        f"tree {TreeSize(**trees['ngram']['tree_size'])} (default)"
        in coral(*asked, "--max-new-tokens", 4).err
    )
    drafters = (own, f"{own}+ngram", f"{odd}+full", "look=ngram", f"mine={own}+full+ngram")
    named = run("named", *(word for drafter in drafters for word in ("--drafter", drafter)))
    assert [name for name, rows in named.items() if rows[0][0] == "drafter"] == [
        "drafter", "drafter+ngram", "odd+full", "look", "mine"
    ]  # fmt: skip
    assert [row[0] for row in named["ngram"]] == ["peer", "peer"]


def test_demo_and_the_default_pair(coral, toy: Path) -> None:
    """Stops a demo whose table compares different tokens, or has none, and a default without its drafter."""
    result = coral("demo", "--max-new-tokens", 6)
    said = [line for line in result.err.splitlines() if not line.startswith("Building ")]
    assert result.code == 0 and said == [] and "Until then" not in result.out
    for name, kind in (("Hugging Face generate", r"\d of 6|yes"), ("plain", "yes"), ("CORAL", "yes")):
        assert re.search(rf"{name} .*\d\.\d\dx .*({kind})", result.out), result.out
    written = coral("generate", "hi", "--max-new-tokens", 8, "--stats", "--tree", "2,2,4")
    assert written.out == coral("generate", "hi", "--max-new-tokens", 8, "--drafter", "plain").out
    assert "draft tokens accepted" in written.err and " 0 draft tokens" not in written.err


def test_the_demo_says_why_and_shows_the_toy(coral, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops a first impression that is a stack trace, or a toy that is taken for the real thing; outside of a
    checkout there is no toy.
    """
    monkeypatch.setenv("CORAL_MODELS", str(tmp_path / "models"))
    shown = coral("demo", "--max-new-tokens", 2)
    assert shown.code == 0 and "CORAL" in shown.out
    assert "cannot fetch" in (why := shown.out.splitlines()[0]) and "toy" in why
    monkeypatch.setattr("coral.target.default.TOY", tmp_path / "no checkout")
    refused = coral("demo")
    assert refused.code == 2 and refused.out == "" and refused.err.startswith("coral: cannot fetch")
