"""Drafters go to the hub and come back: through the hub's own client, against a stand-in on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hub_stand_in import TOKEN, Hub, talk_to
from transformers import AutoModelForCausalLM

from coral.drafters import checkpoint
from coral.drafters.heads import store as heads
from coral.target import download as downloads

REPO = "me/drafter"
GENERATE = ("generate", "What is a reef?", "--max-new-tokens", "8")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process's client talks to, with a cache of its own and the right token."""
    with Hub() as hub:
        talk_to(hub, tmp_path / "cache", monkeypatch)
        yield hub


@pytest.fixture
def drafter(models: Path, tmp_path: Path) -> Path:
    """A drafter with a head, a tuned tree and the state of its training, in a directory of its own."""
    directory = tmp_path / "drafter"
    shutil.copytree(models / "drafter", directory)
    heads.save(directory, "static", {"ids": torch.arange(100)})
    heads.save_token_map(directory, torch.arange(100))
    (directory / "coral" / "trees.json").write_text('{"trees": []}')
    (directory / "coral" / "training").mkdir()
    (directory / "coral" / "training" / "state.pt").write_bytes(b"large and private")
    return directory


def files(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    repository = hub.repositories[REPO]
    return repository.commits[repository.branches[branch]]


@pytest.mark.slow
def test_pushed_and_used(coral, hub: Hub, drafter: Path, models: Path, tmp_path: Path) -> None:
    """Stops a file that is lost or published by mistake, a revision that is not the one that was asked for,
    and heads or trees that are only found in a directory.
    """
    pushed = coral("push", drafter, REPO, "--license", "mit", "--message", "First")
    assert (pushed.code, pushed.err.startswith("note: the drafter's target is ")) == (0, True), pushed.err
    first = hub.repositories[REPO].branches["main"]
    assert f"{REPO}@{first}" in pushed.out and hub.repositories[REPO].messages == ["initial commit", "First"]
    local = {p.relative_to(drafter).as_posix(): p.read_bytes() for p in drafter.rglob("*") if p.is_file()}
    del local["coral/training/state.pt"]
    found = files(hub)
    assert set(found) - set(local) == {"README.md", ".gitattributes"}
    assert {path: found[path] for path in local} == local

    # A later push replaces it, and what is gone stays gone.
    heads_before = sorted(path for path in found if path.startswith("coral/heads/"))
    shutil.rmtree(drafter / "coral" / "heads")
    assert coral("push", drafter, REPO).code == 0
    assert heads_before and not [path for path in files(hub) if path.startswith("coral/heads/")]

    target = ("--target", models / "target")
    plain = coral(*GENERATE, *target)
    assert plain.code == 0 and plain.out.strip()
    for name in (REPO, f"{REPO}@main", f"{REPO}@{first}", f"{REPO}@{first}+static", f"{REPO}@{first}+ngram"):
        assert coral(*GENERATE, *target, "--drafter", name).out == plain.out, name
    lost = coral(*GENERATE, *target, "--drafter", f"{REPO}+static")
    assert lost.code == 2 and "has no static head" in lost.err
    at_first = checkpoint.locate(f"{REPO}@{first}")
    assert heads.resolve(at_first, "auto") == "static" and (at_first / "coral" / "trees.json").exists()
    assert not (at_first / "coral" / "training").exists()
    assert heads.resolve(checkpoint.locate(REPO), "auto") == "in_context"


@pytest.mark.slow
def test_the_hub_is_asked_once(
    coral, hub: Hub, drafter: Path, models: Path, tmp_path: Path, monkeypatch
) -> None:
    """Stops a drafter of one revision that drafts with the head or the tree of the next, and waiting for the
    network again and again."""
    assert coral("push", drafter, REPO, "--base-model", "me/target").code == 0
    asked, download = [], downloads.drafter
    monkeypatch.setattr(downloads, "drafter", lambda *name: (asked.append(name), download(*name))[1])
    assert coral(*GENERATE, "--target", models / "target", "--drafter", f"{REPO}+static+ngram").code == 0
    assert len(asked) == 1
    suite = tmp_path / "mine.jsonl"
    suite.write_text('{"id": 1, "turns": ["ask"]}\n')
    bench = ("bench", "--target", models / "target", "--drafter", REPO, "--suite", suite, "--no-peers",
             "--temperature", 0, "--temperature", 1, "--max-new-tokens", 4,
             "--backend=transformers")  # fmt: skip
    assert coral(*bench, "--output", tmp_path / "out").code == 0
    assert len(asked) == 2
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["drafters"] == {REPO.partition("/")[2]: REPO}


def test_branches_and_private_repositories(coral, hub: Hub, drafter: Path, monkeypatch) -> None:
    """Stops a branch that ends up on main, and a private drafter that becomes public."""
    common = ("push", drafter, REPO, "--base-model", "me/target")
    assert coral(*common, "--private", "--revision", "v1").code == 0
    assert hub.repositories[REPO].private and set(files(hub)) == {".gitattributes"}
    assert "model.safetensors" in files(hub, "v1")
    assert coral(*common, "--private", "--revision", "v1").code == 0  # again, into what is there
    assert (checkpoint.locate(f"{REPO}@v1") / "model.safetensors").exists()
    hub.repositories[REPO].private = False
    refused = coral(*common, "--private")
    assert refused.code == 2 and "is public; make it private" in refused.err
    hub.repositories[REPO].private = True
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(drafter.parent / "another"))
    hidden = coral(*GENERATE, "--drafter", f"{REPO}@v1")
    assert hidden.code == 2 and "no such repository, or it is private" in hidden.err


def test_what_belongs_to_no_drafter_is_refused(coral, hub: Hub, drafter: Path) -> None:
    """Stops publishing someone's notes, and deleting someone's model."""
    (drafter / "notes.txt").write_text("private")
    (drafter / "coral" / "other.safetensors").write_text("?")
    refused = coral("push", drafter, REPO)
    assert refused.code == 2 and "coral/other.safetensors, notes.txt" in refused.err
    assert not hub.repositories
    (drafter / "notes.txt").unlink()
    (drafter / "coral" / "other.safetensors").unlink()
    assert coral("push", drafter, REPO).code == 0
    repository = hub.repositories[REPO]
    before = repository.commit("main", {**files(hub), "model-00001-of-00002.safetensors": b"llm"}, "Llm")
    refused = coral("push", drafter, REPO)
    assert refused.code == 2 and "model-00001-of-00002.safetensors; push to one of its own" in refused.err
    assert repository.branches["main"] == before
    assert coral("push", drafter.parent, REPO).code == 2  # no drafter at all


@pytest.mark.parametrize(
    ("token", "repo", "reason"),
    [
        ("hf_wrong", REPO, "refuses the access token; log in"),
        ("", REPO, "refuses the access token; log in"),
        (TOKEN, "others/drafter", "refuses the access token; log in with one that may"),
        (TOKEN, "not a name", "write it as OWNER/NAME"),
    ],
)
def test_pushing_without_permission(coral, hub: Hub, drafter: Path, monkeypatch, token, repo, reason) -> None:
    """Stops a traceback of the client, and a message that does not say what to do."""
    monkeypatch.setenv("HF_TOKEN", token)
    refused = coral("push", drafter, repo)
    assert refused.code == 2 and reason in refused.err and refused.err.count("\n") <= 2, refused.err


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("me/nothing", "no such repository, or it is private"),
        (f"{REPO}@v9", "has no revision 'v9'"),
        (f"{REPO}@", "names no revision"),
        ("{drafter}@v1", "is a directory, which has no revisions"),
    ],
)
def test_names_that_are_not_there(coral, hub: Hub, drafter: Path, models: Path, name, reason) -> None:
    """Stops another revision from being used in silence."""
    assert coral("push", drafter, REPO).code == 0
    name = name.format(drafter=drafter)
    for command in (GENERATE, ("bench", "--output", drafter.parent / "out")):
        drafted = f"x={name}" if command[0] == "bench" else name
        refused = coral(*command, "--target", models / "target", "--drafter", drafted)
        assert refused.code == 2 and reason in refused.err, refused.err


def test_no_network(coral, hub: Hub, drafter: Path, models: Path, monkeypatch) -> None:
    """Stops a wait without end; what was downloaded still works."""
    assert coral("push", drafter, REPO).code == 0
    commit = hub.repositories[REPO].branches["main"]
    use = (*GENERATE, "--target", models / "target", "--drafter")
    assert coral(*use, f"{REPO}@{commit}").code == 0
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nowhere)
    template = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert coral(*use, f"{REPO}@{commit}").code == 0
    for refused in (coral(*use, "me/other"), coral("push", drafter, REPO)):
        assert refused.code == 2 and "cannot be reached" in refused.err and "network" in refused.err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert coral(*use, f"{REPO}@{commit}").code == 0
    refused = coral(*use, "me/other")
    assert refused.code == 2 and "HF_HUB_OFFLINE" in refused.err


@pytest.mark.slow
def test_the_cache_is_not_written_into(coral, hub: Hub, drafter: Path, models: Path) -> None:
    """Stops `tune` and `train-head` from changing a download, which other programs share."""
    assert coral("push", drafter, REPO, "--revision", "v1").code == 0
    kept = {p: p.read_bytes() for p in checkpoint.locate(f"{REPO}@v1").rglob("*") if p.is_file()}
    target = ("--target", models / "target")
    copy = f"hf download {REPO} --revision v1 --local-dir DRAFTER"
    for command in (("tune", f"{REPO}@v1"), ("train-head", f"{REPO}@v1", "--data", "nowhere")):
        refused = coral(*command, *target)
        assert refused.code == 2 and copy in refused.err
    few = ("--prompts", "1", "--max-new-tokens", "4", "--no-write")
    shown = coral("tune", f"{REPO}@v1", *target, *few)
    assert shown.code == 0 and "to use it: --tree " in shown.out
    assert {p: p.read_bytes() for p in checkpoint.locate(f"{REPO}@v1").rglob("*") if p.is_file()} == kept


def metadata(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.slow
def test_the_card(coral, hub: Hub, drafter: Path, models: Path, tmp_path: Path) -> None:
    """Stops a card without the target, the commands or the numbers, and one that overwrites your own."""
    path = drafter / "coral" / "config.json"
    recorded = json.loads(path.read_text())
    recorded["target"] |= {"name": "me/target", "revision": "abc123"}
    recorded["recipe"] = {"recipe": "coral", "steps": 3}
    recorded["metrics"] = {"updates": 7, "seconds": 9, "acceptance": {"chain": 1.5, "tree": 2.25}}
    path.write_text(json.dumps(recorded))
    few = (
        "--limit",
        "1",
        "--max-new-tokens",
        "4",
        "--backend=transformers",
        "--no-peers",
        "--suite",
        "gsm8k",
    )
    done = coral(
        "bench",
        "--output",
        tmp_path / "out",
        "--target",
        models / "target",
        "--drafter",
        f"own={drafter}",
        *few,
    )
    assert done.code == 0, done.err
    shown = coral("push", drafter, REPO, "--license", "mit", "--data-note", "Ten chats.", "--bench", tmp_path / "out", "--dry-run")  # fmt: skip  # noqa: E501
    card = shown.out
    assert shown.code == 0 and not hub.repositories
    found = metadata(card)
    assert (found["base_model"], found["base_model_revision"]) == ("me/target", "abc123")
    assert (found["library_name"], found["license"]) == ("coral", "mit")
    assert {"speculative-decoding", "eagle"} <= set(found["tags"])
    for text in (
        f"--target me/target --drafter {REPO}", f'for_transformers("{REPO}")', "vllm serve me/target",
        "sglang.launch_server --model-path me/target", "steps: 3", "7 updates", "Ten chats.",
        "| chain of 4 | 1.50 |", "| tree of 24 | 2.25 |", "| own |", "Reproduce with `coral bench",
    ):  # fmt: skip
        assert text in card, text
    (drafter / "README.md").write_text(card.replace("Ten chats", "My own words"))
    assert coral("push", drafter, REPO).code == 0
    assert b"My own words" in files(hub)["README.md"]
    refused = coral("push", drafter, REPO, "--license", "mit")
    assert refused.code == 2 and "--license would change nothing" in refused.err
    (drafter / "README.md").unlink()
    refused = coral("push", drafter, REPO, "--bench", tmp_path)
    assert refused.code == 2 and "holds no bench results" in refused.err


def test_a_drafter_that_engines_cannot_serve_says_so(coral, drafter: Path) -> None:
    """Stops a card with commands that load garbage."""
    path = drafter / "coral" / "config.json"
    recorded = json.loads(path.read_text())
    recorded["drafter"]["normalised_feedback"] = True
    path.write_text(json.dumps(recorded))
    card = coral("push", drafter, REPO, "--base-model", "me/target", "--dry-run").out
    assert "vllm serve" not in card and "vLLM cannot serve it, for it knows no drafter.normalised" in card
    assert "launch_server" not in card and "SGLang cannot serve it" in card
    assert metadata(card)["base_model"] == "me/target" and "base_model_revision" not in metadata(card)


def test_in_transformers(coral, hub: Hub, drafter: Path, models: Path) -> None:
    """Stops a hub drafter that works on the command line only."""
    assert coral("push", drafter, REPO).code == 0
    import coral as package

    model = AutoModelForCausalLM.from_pretrained(models / "target")
    ids = torch.tensor([[9, 8, 7]])
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    function = package.for_transformers(f"{REPO}@main")
    assert torch.equal(
        model.generate(ids, max_new_tokens=6, do_sample=False, custom_generate=function), expected
    )


SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
from coral.cli.main import main

def coral(*arguments):
    sys.argv = ["coral", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code, arguments

target, drafter, repo = sys.argv[1:]
coral("push", drafter, repo, "--base-model", "me/target")
for name in ("plain", f"{repo}@main"):
    coral("generate", "What is a reef?", "--max-new-tokens", "8", "--target", target, "--drafter", name)
    print("---")
model = AutoModelForCausalLM.from_pretrained(target)
ids = torch.tensor([[9, 8, 7]])
form = dict(custom_generate=repo, revision="main", trust_remote_code=True)
print(torch.equal(model.generate(ids, max_new_tokens=6), model.generate(ids, max_new_tokens=6, **form)))
print(*(key[0].source for key in model._coral))
"""


@pytest.mark.slow
def test_from_a_shell(hub: Hub, drafter: Path, models: Path, tmp_path: Path) -> None:
    """The same in a process of its own, which reads HF_ENDPOINT and HF_TOKEN as everybody's does; there
    transformers fetches the function from the hub by itself.
    """
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", SCRIPT, str(models / "target"), str(drafter), REPO]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    pushed, plain, rest = done.stdout.split("---\n")
    assert "pushed" in pushed and pushed.endswith(plain) and plain.strip()
    assert rest.split() == ["True", f"{REPO}@main"]
