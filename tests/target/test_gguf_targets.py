"""GGUF files where a target or tokenizer is named: on disk, on the hub, and what is kept of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stand_in import Hub, Repository, talk_to
from tiny_gguf import write_gguf
from tiny_tokenizer import PLAIN, SPECIALS, tiny_tokenizer
from transformers import AutoModelForCausalLM

import coral as package
from coral.cli.options import read_tokenizer
from coral.data.prepared import vocabulary_digest
from coral.errors import CoralError
from coral.target.gguf import cache, convert, names
from coral.target.target import Target

GENERATE = ("generate", "What is a reef?", "--max-new-tokens", "8")
REPO = "me/tiny-GGUF"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path_factory.mktemp("cache") / "gguf"
    monkeypatch.setattr(cache, "root", lambda: directory)  # not XDG_CACHE_HOME, where native code lies, too
    return directory


@pytest.fixture(scope="session")
def master(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target of the tests as a GGUF file in float32, with the tokenizer's vocabulary and template."""
    tokenizer = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    vocabulary = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)),
        "merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 0,
        "add_bos_token": True,
    }
    model = AutoModelForCausalLM.from_pretrained(models / "target")
    path = tmp_path_factory.mktemp("gguf") / "tiny-F32.gguf"
    return write_gguf(path, model, vocabulary, template=PLAIN)


@pytest.fixture
def file(master: Path, tmp_path: Path) -> Path:
    """A copy in a directory of its own."""
    (tmp_path / "gguf").mkdir()
    return Path(shutil.copy(master, tmp_path / "gguf" / "tiny-F32.gguf"))


@pytest.fixture
def hub(tmp_path: Path, master: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a repository of GGUF files."""
    with Hub() as hub:
        talk_to(hub, tmp_path / "hub", monkeypatch)
        repository = Repository(private=False)
        stored = dict.fromkeys(("tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf", "other/tiny-Q8_0.gguf"), b"GGUF")
        stored |= {"README.md": b"", "mmproj-F32.gguf": b"GGUF", "tiny-F32.gguf": master.read_bytes()}
        stored |= {"BF16/tiny-BF16-00001-of-00002.gguf": b"1", "BF16/tiny-BF16-00002-of-00002.gguf": b"2"}
        repository.commit("main", stored, "files")
        hub.repositories[REPO] = repository
        yield hub


def test_a_file_is_a_target_in_every_command(coral, file: Path, models: Path, tmp_path: Path) -> None:
    """Stops a target that some commands load and others refuse, and text that is not the model's."""
    plain = coral(*GENERATE, "--target", models / "target", "--dtype", "float32")
    assert plain.code == 0 and plain.out.strip()
    for target in (file, file.parent):
        shown = coral(*GENERATE, "--target", target, "--dtype", "float32")
        assert (shown.code, shown.out) == (0, plain.out), shown.err
    pair = package.load(str(file), dtype="float32")
    assert pair.target.name == str(file) and pair.target.revision is None
    assert pair.target.tokenizer.name_or_path == str(file)
    bench = (
        "bench",
        "--limit",
        "1",
        "--max-new-tokens",
        "4",
        "--backend=transformers",
        "--no-peers",
        "--suite",
        "gsm8k",
    )
    done = coral(*bench, "--target", file, "--output", tmp_path / "out", "--drafter", f"own={models / 'drafter'}", "--dtype", "float32")  # noqa: E501  # fmt: skip
    assert done.code == 0, done.err
    record = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]}
    (tmp_path / "chats.jsonl").write_text((json.dumps(record) + "\n") * 2)
    prepare = ("data", "prepare", tmp_path / "chats.jsonl", "--output", tmp_path / "data", "--held-out", "0")
    assert coral(*prepare, "--tokenizer", file).code == 0
    train = ("train", "--data", tmp_path / "data", "--output", tmp_path / "drafter", "--updates", "1")
    done = coral(*train, "--target", file, "--dtype", "float32")
    assert done.code == 0, done.err
    shown = coral(*GENERATE, "--target", file, "--dtype", "float32", "--drafter", tmp_path / "drafter")
    assert shown.out == plain.out


def test_auto_is_bfloat16(file: Path, models: Path) -> None:
    assert Target.load(file).dtype == torch.bfloat16
    exact, stored = Target.load(file, dtype="float32"), Target.load(models / "target")
    assert exact.dtype == torch.float32 and torch.equal(exact.head_weight, stored.head_weight)
    assert not hasattr(exact.model.config, "quantization_config") and exact.eos_ids == {2}
    with pytest.raises(CoralError, match="dtype 'int8' is not known"):
        Target.load(file, dtype="int8")


def test_the_tokenizer_alone_is_that_of_the_target(file: Path, own_cache: Path) -> None:
    """Stops data that the target refuses, and a conversion where only tokens are asked for."""
    built = read_tokenizer(str(file), None, False)
    assert not list(own_cache.glob("*-v*"))
    target = Target.load(file)
    loaded, text = read_tokenizer(str(file), None, False), "<|user|>the  thin\n\nman<|eot|>"
    for tokenizer in (built, loaded):
        assert vocabulary_digest(tokenizer) == vocabulary_digest(target.tokenizer)
        assert (
            tokenizer(text)["input_ids"]
            == target.tokenizer(text)["input_ids"]
            == tiny_tokenizer()(text)["input_ids"]
        )
        assert tokenizer.chat_template == PLAIN and tokenizer.name_or_path == str(file)


# --- names


def test_one_file_of_a_directory(file: Path) -> None:
    """Stops a guess between quantisations; an image encoder is none, and parts are one."""
    assert names.find(file.parent) == [file]
    (file.parent / "mmproj-F16.gguf").write_bytes(b"GGUF")
    assert names.find(str(file.parent)) == [file]
    parts = [file.with_name(f"tiny-BF16-0000{i}-of-00002.gguf") for i in (1, 2)]
    for part in parts:
        part.write_bytes(b"GGUF")
    with pytest.raises(
        CoralError, match=r"several GGUF files: tiny-BF16-00001-of-00002.gguf, tiny-F32.gguf; name the"
    ):
        names.find(file.parent)
    file.unlink()
    assert names.find(file.parent) == parts == names.find(parts[1])
    parts[0].unlink()
    with pytest.raises(
        CoralError, match=r"one of 2 parts; tiny-BF16-00001-of-00002.gguf should lie beside it"
    ):
        names.find(parts[1])
    (file.parent / "config.json").write_text("{}")
    assert names.find(file.parent) is None


@pytest.mark.parametrize("name", ["nothing.gguf", "./no/such/file.gguf", "/no/such.gguf", "~/x.gguf"])
def test_files_that_are_not_there(coral, name: str, tmp_path: Path) -> None:
    """Stops a question to the hub about a path, and a traceback."""
    for command in (GENERATE, ("convert", name, tmp_path / "out")):
        refused = coral(*command, *(("--target", name) if command is GENERATE else ()))
        assert refused.code == 2 and f"there is no file {name}; check the path" in refused.err, refused.err


def test_no_model_in_a_directory(coral, tmp_path: Path) -> None:
    refused = coral(*GENERATE, "--target", tmp_path)
    assert refused.code == 2 and "holds neither config.json nor a GGUF file" in refused.err
    refused = coral("convert", tmp_path, tmp_path / "out")
    assert refused.code == 2 and "names no GGUF file" in refused.err


def test_on_the_hub(coral, hub: Hub, models: Path, master: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops a quantisation that is found in another's name, and a download that is needed twice."""
    plain = coral(*GENERATE, "--target", models / "target", "--dtype", "float32")
    for name in (f"{REPO}:F32", f"{REPO}:f32", f"{REPO}/tiny-F32.gguf"):
        shown = coral(*GENERATE, "--target", name, "--dtype", "float32")
        assert (shown.code, shown.out) == (0, plain.out), shown.err
        assert read_tokenizer(name, None, False).name_or_path == name
    found = names.find(f"{REPO}:BF16", "main")
    assert found is not None and [path.read_bytes() for path in found] == [b"1", b"2"]
    first = hub.repositories[REPO].branches["main"]
    assert names.find(f"{REPO}:Q4_K_M", first) is not None
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nowhere)
    template = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    shown = coral(*GENERATE, "--target", f"{REPO}:F32", "--dtype", "float32")
    assert (shown.code, shown.out) == (0, plain.out), shown.err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shown = coral(*GENERATE, "--target", f"{REPO}:F32", "--dtype", "float32")
    assert (shown.code, shown.out) == (0, plain.out), shown.err


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (f"{REPO}:Q5_K_M", "no GGUF file of the quantisation 'Q5_K_M'; it holds BF16/tiny-BF16-00001"),
        (f"{REPO}:Q8_0", f"several GGUF files: other/tiny-Q8_0.gguf, tiny-Q8_0.gguf; name it as {REPO}/FILE"),
        (f"{REPO}:K_M", "no GGUF file of the quantisation 'K_M'"),
        (f"{REPO}/none.gguf", "holds no none.gguf; it holds"),
        ("me/nothing:Q4_K_M", "no such repository, or it is private"),
        (REPO, f"It holds GGUF files; name one of .*tiny-F32.gguf.* as {REPO}/FILE.gguf"),
    ],
)
def test_names_that_fit_nothing_on_the_hub(coral, hub: Hub, name: str, reason: str) -> None:
    refused = coral(*GENERATE, "--target", name)
    assert refused.code == 2 and re.search(reason, refused.err), refused.err


# --- the cache


def test_converted_once(file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops a wait at every start, and weights of a file that was replaced."""
    made = cache.directory(file)
    calls: list[Path] = []
    monkeypatch.setattr(
        convert, "write", lambda file, *_: calls.append(file.paths[0]) or pytest.fail("again")
    )
    monkeypatch.setattr(cache, "_sha256", lambda path: pytest.fail("read again"))
    assert cache.directory(file) == cache.directory(file.parent) == made
    assert made is not None and made.parent == own_cache
    monkeypatch.undo()
    monkeypatch.setattr(cache, "root", lambda: own_cache)
    copied = Path(shutil.copy(file, file.parent.parent / "moved.gguf"))
    assert cache.directory(copied) == made  # the content decides
    assert cache.directory(file, "float32") != made
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    os.utime(file, (1, 1))
    assert cache.directory(file) != made


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.root() == Path("/somewhere/coral/gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache.root() == Path.home() / ".cache" / "coral" / "gguf"


def test_nothing_half_written(file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops a conversion that was interrupted from being taken for a whole one."""
    from coral.target.gguf import weights

    real = weights._values

    def interrupted(*arguments: Any) -> Iterator[torch.Tensor]:
        yield from real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "_values", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.directory(file)
    assert not cache.entries() and not list(own_cache.glob("*/*"))
    monkeypatch.setattr(weights, "_values", real)
    assert Target.load(file).vocab_size


def test_processes_at_once_convert_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops eight processes of a training from making the same eight times."""
    real, made = convert.write, []

    def counted(*arguments: Any) -> None:
        made.append(arguments)
        real(*arguments)

    monkeypatch.setattr(convert, "write", counted)
    found: list[Path | None] = []
    threads = [threading.Thread(target=lambda: found.append(cache.directory(file))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 4 and len(made) == 1


def test_the_longest_unused_goes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops a cache that grows without end, and one that deletes what was just used."""
    made = [cache.directory(file, dtype) for dtype in ("bfloat16", "float32")]
    for age, entry in enumerate(made):
        assert entry is not None
        os.utime(entry / "coral.json", (1000 + age, 1000 + age))
    assert cache.directory(file, "bfloat16") == made[0]  # so float32 is the older
    sizes = sum(entry.size for entry in cache.entries())
    monkeypatch.setenv("CORAL_CACHE_GB", str(sizes / 1e9))
    third = cache.directory(file, "float16")
    assert [entry.path for entry in cache.entries()] == [third, made[0]]
    monkeypatch.setenv("CORAL_CACHE_GB", "0")
    again = cache.directory(file, "float32")
    assert [entry.path for entry in cache.entries()] == [again]
    monkeypatch.setenv("CORAL_CACHE_GB", "much")
    assert cache.directory(file, "float32") == again
    with pytest.raises(CoralError, match="CORAL_CACHE_GB is 'much'; set it to a number"):
        cache.directory(file, "bfloat16")


def test_cache_lists_and_clears(coral, file: Path, own_cache: Path) -> None:
    empty = coral("cache")
    assert empty.code == 0 and empty.out.startswith("0.00 GB of at most 50 (CORAL_CACHE_GB)")
    entries = [cache.directory(file, dtype) for dtype in ("bfloat16", "float32")]
    shown = coral("cache")
    assert all(entry is not None and entry.name in shown.out for entry in entries) and str(file) in shown.out
    assert entries[0] is not None and entries[1] is not None
    assert coral("cache", entries[0].name).code == 2
    refused = coral("cache", "--clear", "x")
    assert refused.code == 2 and "holds no entry x" in refused.err
    assert f"deleted {entries[0].name}" in coral("cache", "--clear", entries[0].name).out
    assert [entry.path for entry in cache.entries()] == [entries[1]]
    assert coral("cache", "--clear").code == 0 and not list(own_cache.glob("*-v*"))
    assert cache.directory(file) == entries[0]


# --- coral convert


def test_convert(coral, file: Path, models: Path, tmp_path: Path, own_cache: Path) -> None:
    """Stops a directory that only this package loads, and one that is written over something."""
    done = coral("convert", file, tmp_path / "plain", "--dtype", "float32")
    assert (done.code, done.out) == (0, f"converted {file.name}: {tmp_path / 'plain'}\n"), done.err
    assert not own_cache.exists() and not (tmp_path / "plain" / "coral.json").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    stored = AutoModelForCausalLM.from_pretrained(models / "target")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stored.parameters(), strict=True))
    plain = coral(*GENERATE, "--target", models / "target")
    assert coral(*GENERATE, "--target", tmp_path / "plain").out == plain.out
    refused = coral("convert", file, tmp_path / "plain")
    assert refused.code == 2 and "holds files already" in refused.err
    refused = coral("convert", file, tmp_path / "new", "--dtype", "q4")
    assert refused.code == 2 and "dtype 'q4' is not known" in refused.err and not (tmp_path / "new").exists()
    refused = coral("convert", models / "target", tmp_path / "new")
    assert refused.code == 2 and "names no GGUF file" in refused.err


def test_a_full_disk_is_said_before_the_work(coral, file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
    refused = coral("convert", file, tmp_path / "new")
    assert refused.code == 2 and "free some space" in refused.err and not (tmp_path / "new").exists()
