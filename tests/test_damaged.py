"""Files of ours that are damaged, in whatever way: a sentence that names the file, never a traceback."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import FILES, damaged, ours
from safetensors.torch import load_file, save_file
from tiny_training import tiny_drafter, tiny_target

from coral import config, json_file
from coral.data.regenerate import regenerate
from coral.drafters import checkpoint, tuned
from coral.drafters.heads import store as heads
from coral.errors import CoralError
from coral.hub.card import card
from coral.target.record import TargetRecord
from coral.training.recipe import TrainConfig, config_type, load_recipe
from coral.training.run_state import RunState, folder
from coral.training.run_state import load as load_state
from coral.training.run_state import save as save_state


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory with a file of each kind."""
    directory = tmp_path_factory.mktemp("ours")
    ours(directory)
    return directory


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_is_a_sentence(place: Path, kind: str) -> None:
    """Stops a traceback, a hang and a number out of range from a file that a disk or an editor damaged."""
    name, read = FILES[kind]
    path, draw = place / name, random.Random(kind)
    whole = path.read_bytes()
    read(place)
    refused = 0
    try:
        for _ in range(120):
            path.write_bytes(damaged(whole, draw))
            try:
                read(place)
            except CoralError as error:
                refused += 1
                assert "Traceback" not in str(error) and str(place) in str(error)
    finally:
        path.write_bytes(whole)
    assert refused > 30
    path.unlink()
    if kind not in ("trees", "a stopped bench", "features"):  # the directory holds prepared data, too
        with pytest.raises(CoralError):
            read(place)
    path.write_bytes(whole)


def test_the_reader_is_strict_and_says_where(tmp_path: Path) -> None:
    """Stops true from being taken for 1, an unknown key for none, and a file's name for damage."""
    for content, message in (
        (b'{"trees": [], "tree": 1}', "tree: unexpected keyword"),
        (b"[" * 100_000, "recursion limit"),
        (b'{"a": NaN}', "trees: "),
        (b"\xff", "expected value"),
        (b"", "EOF"),
    ):
        with pytest.raises(CoralError, match=rf"f\.json cannot be read \(.*{message}.*\); do this\."):
            json_file.parse(content, tuned._Trees, "f.json", "do this.")
    with pytest.raises(CoralError, match="No such file"):
        json_file.read(tmp_path / "none", dict, "do this.")
    assert json_file.parse(b'["a\\udcff", "\\ud83d\\ude00"]', list[str], "", "") == ["a?", "\U0001f600"]
    for value in (b"[true]", b'["1"]', b"[1.0]", b"[-1]"):
        with pytest.raises(CoralError):
            json_file.parse(value, list[json_file.Id], "", "")


def test_weights_that_are_not_numbers_are_refused_by_name(tmp_path: Path) -> None:
    """Stops a drafter of NaN that drafts nothing right, and one that no memory can hold."""
    target = tiny_target()
    checkpoint.save(tiny_drafter(), tmp_path, target=TargetRecord.of(target))
    file = tmp_path / "model.safetensors"
    whole, name = load_file(file), "layers.0.mlp.up_proj.weight"
    for odd in (float("nan"), float("inf")):
        tensors = {key: value.clone() for key, value in whole.items()}
        tensors[name][0, 0] = odd
        save_file(tensors, file)
        with pytest.raises(CoralError, match=rf"{name} holds numbers that are not finite"):
            checkpoint.load(tmp_path, target)
    save_file({key: value.to(torch.int8) for key, value in whole.items()}, file)
    with pytest.raises(CoralError, match=r"is stored as torch\.int8"):
        checkpoint.load(tmp_path, target)
    save_file(whole, file)
    ours = json.loads((tmp_path / "coral" / "config.json").read_text())
    for key, value, message in (
        ("intermediate_size", 2**30, "has shape"),
        ("num_key_value_heads", 3, "make no drafter"),
        ("hidden_act", "default", "is not known"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "describes no drafter"),
    ):
        changed = {**ours, "drafter": {**ours["drafter"], key: value}}
        (tmp_path / "coral" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CoralError, match=message):
            checkpoint.load(tmp_path, target)


def test_damaged_heads_are_refused(tmp_path: Path) -> None:
    """Stops a head of another shape, and a file that names none."""
    heads.save(tmp_path, "static", {"ids": torch.arange(4)})
    own = tmp_path / "coral" / "heads" / "own"
    for content in (b"\xff\xfe", b"", b"full", b"../static"):
        own.write_bytes(content)
        with pytest.raises(CoralError, match="names no head"):
            heads.resolve(tmp_path, "auto")
    for ids in (torch.arange(4)[:, None], torch.ones(4), torch.zeros(0, dtype=torch.int64)):
        heads.save(tmp_path, "static", {"ids": ids})
        with pytest.raises(CoralError, match=r"static\.safetensors cannot be read"):
            heads.static_ids(tmp_path)


def _inside(value: Any, place: tuple[Any, ...]) -> Any:
    return _inside(value[place[0]], place[1:]) if place else value


def test_damaged_training_state_is_refused(tmp_path: Path) -> None:
    """Stops a traceback from half a state, and moments of other weights."""
    target, options = tiny_target(), config_type("feature")()
    record = TargetRecord.of(target)
    moments: list[dict[str, Any]] = [{"state": {}, "param_groups": []}]
    save_state(tmp_path / "o", tiny_drafter(), record, options, moments, RunState(update=1), 5, "digest")
    load_state(tmp_path / "o", options, 5, "digest")
    path = folder(tmp_path / "o") / "state.pt"
    whole = torch.load(path, weights_only=True)
    places: list[tuple[Any, ...]] = [(), ("state",), ("optimiser", 0)]
    for inside, key in [(each, key) for each in places for key in _inside(whole, each)]:
        for odd in ("x", None, -1):
            changed = copy.deepcopy(whole)
            _inside(changed, inside)[key] = odd
            torch.save(changed, path)
            with pytest.raises(CoralError):
                load_state(tmp_path / "o", options, 5, "digest")
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(CoralError, match=r"state\.pt cannot be read"):
        load_state(tmp_path / "o", options, 5, "digest")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed must be at least 0, not -1"),
        ("optimiser.beta1=5", "beta1 must be below 1, not 5"),
        ("optimiser.beta2=-0.1", "beta2 must be at least 0"),
        ("optimiser.learning_rate=0", "learning_rate must be above 0"),
        ("optimiser.learning_rate=.nan", "learning_rate must be a finite number"),
        ("optimiser.gradient_clip=.inf", "gradient_clip must be a finite number"),
        ("optimiser.warmup=2", "warmup must be at most 1"),
        ("loss.regression=-1", "regression must be at least 0"),
        ("loss.top_k_weight=1e300", "top_k_weight must be at most 1e"),
        ("noise=.nan", "noise must be a finite number"),
        ("steps=1000000000", "steps must be at most 64"),
        ("batch_size=true", "batch_size must be int, not 'True'"),
        ("alignment.temperature=0", "temperature must be at least 0.001"),
        ("limits.updates=0", "updates must be at least 1"),
        ("limits.minutes=.inf", "minutes must be a finite number"),
        ("limits.epochs=null", "give one of limits"),
        ("reports.checkpoint_minutes=-1", "checkpoint_minutes must be at least 0"),
        ("drafter.intermediate_size=many", "intermediate_size must be int or none, not 'many'"),
        ("recipe=" + "[" * 5000, "cannot read the value"),
    ],
)
def test_numbers_of_a_recipe_have_bounds(override: str, message: str) -> None:
    """Stops a run of hours that ends in NaN, or that never ends."""
    with pytest.raises(CoralError, match=message):
        load_recipe("coral", [override])


def test_a_recipe_that_learns_nothing_and_one_without_end(tmp_path: Path) -> None:
    """Stops weights that are all 0, values that Python code hands in, and a file nested without end."""
    zero = ["loss.regression=0", "loss.divergence_weight=0", "loss.top_k_weight=0", "alignment.weight=0"]
    with pytest.raises(CoralError, match="every weight of the loss is 0"):
        load_recipe("coral", zero)
    with pytest.raises(CoralError, match="batch_size must be at least 1, not 0"):
        config.check(TrainConfig(batch_size=0))
    for content in (b"[" * 100_000, b"steps: \xff", b"recipe: 2026-99-99"):
        (tmp_path / "r.yaml").write_bytes(content)
        with pytest.raises(CoralError, match=r"r\.yaml is not YAML"):
            load_recipe(tmp_path / "r.yaml")


def test_a_damaged_account_is_refused(tmp_path: Path) -> None:
    """Stops a traceback where a run of answers is to go on, and a record that is asked twice."""
    source, output = tmp_path / "c.jsonl", tmp_path / "o.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')

    def answer(jobs: Any, finish: Callable[[Any], None]) -> None:
        for job in jobs:
            if not job.before:
                job.messages.append(job.users.pop(0))
                job.asked = True
                job.take("an answer", True, True)
            finish(job)

    def run() -> int:
        return regenerate([source], output, answer, settings={"seed": 0}).written

    assert run() == 2
    account = tmp_path / "o.account.json"
    for path in (account, output):
        whole = path.read_bytes()
        for content in (
            b"[" * 100_000,
            b"5",
            b"[]",
            b'{"asked": 3, "source": []}',
            b"\xff\xfe",
            b'{"messages": [1]}',
        ):
            path.write_bytes(content + b"\n")
            with pytest.raises(CoralError, match=r"o\.jsonl"):
                run()
        path.write_bytes(whole)
    assert run() == 2


@pytest.mark.parametrize(
    "group, key, value", [("drafter", "rope_parameters", {"rope_type": {}}), ("metrics", "seconds", None)]
)
def test_a_record_with_odd_parts(place: Path, group: str, key: str, value: Any) -> None:
    """Stops a traceback of a rotary type that is no text, and of a card whose metrics lack the time."""
    path = place / "coral" / "config.json"
    whole = path.read_bytes()
    record = json.loads(whole)
    record[group][key] = value
    if value is None:
        del record[group][key]
    try:
        path.write_text(json.dumps(record))
        if value is None:
            assert "updates in" not in card(place, "me/drafter")
        else:
            with pytest.raises(CoralError, match="is no rotary embedding of a drafter"):
                checkpoint.load(place)
    finally:
        path.write_bytes(whole)
