"""Several processes learn what one does, however weights are spread; all stop together, and one writes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from test_train import CONFIG, interrupt_at_first, metrics, run, weights
from tiny import tiny_model
from tiny_pair import save_target
from tiny_training import tiny_data
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from coral.data import features as feature_batches
from coral.drafters import checkpoint
from coral.drafters.feature.learning_options import DrafterOptions
from coral.errors import CoralError
from coral.target.target import Target
from coral.training import parallel, trackers
from coral.training.recipe import Reports

CLIPPED = replace(CONFIG.optimiser, gradient_clip=0.05)  # always
# In two processes; noise and alignment included.
TOGETHER = replace(CONFIG, batch_size=2, accumulate=2, optimiser=CLIPPED)
ALONE = replace(TOGETHER, accumulate=4)
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def in_two_processes(function, *arguments):
    AcceleratorState._reset_state(reset_partial_state=True)  # else the forks take over this process's
    debug_launcher(function, arguments, num_processes=2)


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def timeless(output):
    """What does not depend on the clock, of every line that a whole run wrote."""
    kept = ("update", "accuracy", "acceptance")
    return [{key: line.get(key) for key in kept} for line in metrics(output)]


def losses(output):
    return torch.tensor([[x["loss"], x["gradient_norm"]] for x in metrics(output) if "loss" in x])


def interrupted(output, config, environment):
    os.environ.update(environment)
    torch.set_num_threads(1)
    main = parallel.PartialState(cpu=True).is_main_process
    outcome, said = run(output, config, acceptance=interrupt_at_first)  # a signal to one process only
    assert not outcome.finished and outcome.update == 4
    assert ("stopped at update 4" in said) == main and bool(said) == main


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_begin_and_one_goes_on(tmp_path, one_thread, way, precision):
    """Stops: rows or random draws that depend on who reads them, gradients averaged or clipped wrongly,
    shards written in place of weights or moments, and a process that misses the others' stop.
    """
    together, alone = (replace(config, precision=precision) for config in (TOGETHER, ALONE))
    in_two_processes(interrupted, tmp_path / "two", together, FSDP if way == "fsdp2" else {})
    outcome, said = run(tmp_path / "two", alone, acceptance=lambda drafter: {"chain": 1.0})
    assert outcome.finished and outcome.update == 8 and "going on after update 4" in said
    run(tmp_path / "one", alone, acceptance=lambda drafter: {"chain": 1.0})
    assert losses(tmp_path / "one")[:, 1].min() > CLIPPED.gradient_clip
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5, atol=1e-5)
    assert timeless(tmp_path / "two") == timeless(tmp_path / "one")
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def gone_on(output):
    os.environ.update(FSDP)
    torch.set_num_threads(1)
    outcome, _ = run(output, TOGETHER, acceptance=lambda drafter: {"chain": 1.0})
    assert outcome.finished and outcome.update == 8


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_one_process_begins_and_two_go_on_with_shards(tmp_path, one_thread):
    """Stops: moments that are lost, or given whole to a process that holds a part."""
    outcome, _ = run(tmp_path / "two", ALONE, acceptance=interrupt_at_first)
    assert outcome.update == 4
    in_two_processes(gone_on, tmp_path / "two")
    run(tmp_path / "one", ALONE, acceptance=lambda drafter: {"chain": 1.0})
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5, atol=1e-5)
    assert timeless(tmp_path / "two") == timeless(tmp_path / "one")


def sharded(output):
    os.environ.update(FSDP)
    torch.set_num_threads(1)
    device = parallel.join(None)
    assert device == "cpu"
    target = Target(tiny_model("llama"))
    parallel.shard_target(target)
    held = {name: isinstance(p, DTensor) for name, p in target.model.named_parameters()}
    assert [name for name, part in held.items() if not part] == [
        "model.embed_tokens.weight",
        "lm_head.weight",
    ]
    assert isinstance(target.decoder, FSDPModule)
    with pytest.raises(CoralError, match="do not shard the target"):
        run(output, replace(TOGETHER, drafter=DrafterOptions(init_layer=0)), target)
    run(output, TOGETHER, target, acceptance=lambda drafter: pytest.fail("no process can decode alone"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_sharded_target_has_the_same_features(tmp_path, one_thread):
    """Stops: layers that run on their shard, and a process that waits for a forward pass of another."""
    in_two_processes(sharded, tmp_path / "two")
    run(tmp_path / "one", ALONE, Target(tiny_model("llama")))
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5, atol=1e-5)


def disagreeing(output):
    torch.set_num_threads(1)
    rank = parallel.PartialState(cpu=True).process_index
    with pytest.raises(CoralError, match=r"rows of data\] are \[\[0, 24\], \[0, 23\]\]"):
        run(output, TOGETHER, data=tiny_data(rows=24 - rank))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_processes_that_see_different_data_are_refused(tmp_path, one_thread):
    """Stops: machines that train on different rows, or one that goes on while another starts."""
    in_two_processes(disagreeing, tmp_path / "o")


def test_another_number_of_batches_is_not_resumed(tmp_path):
    """Stops: a run whose updates silently become larger or smaller with the number of processes."""
    run(tmp_path / "o", ALONE)
    with pytest.raises(CoralError, match=r"with 4 batches in an update, but 1 processes .*use accumulate=4"):
        run(tmp_path / "o", replace(ALONE, accumulate=3))


def prepare(coral, place, answers):
    """A target and data in `place`, as a person would make them."""
    save_target(place / "target")
    with (place / "c.jsonl").open("w") as file:
        for answer in answers:
            turns = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": answer}
            file.write(json.dumps({"messages": turns}) + "\n")
    command = ("data", "prepare", place / "c.jsonl", "--tokenizer", place / "target", "--held-out", 0)
    assert coral(*command, "--output", place / "data").code == 0


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_machines_stop_together_and_go_on_as_one(coral, tmp_path):
    """Two launchers on this machine: losses of one process, one voice, SIGTERM to the second one's launcher,
    and the run goes on in one process.
    """
    prepare(coral, tmp_path, [f"{i}" * 9 for i in range(9)])
    train = ["train", "--data", tmp_path / "data", "--target", tmp_path / "target", "--device", "cpu"]
    train += ["--set", "batch_size=2", "--set", "reports.log_every=1", "--set", "optimiser.decay=constant"]
    train += ["--set", "optimiser.matrices=adamw"]  # Muon needs a matrix whole
    train += ["--set", "optimiser.warmup=0"]  # so that the limit does not change the first updates
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_machines",
        "2",
        "--num_processes",
        "2",
    ]
    launch += ["--use_fsdp", "--fsdp_version", "2"]
    launch += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    first, second = (
        subprocess.Popen(
            list(map(str, [*launch, "--machine_rank", rank, "-m", "coral", *train, "--output",
                           tmp_path / "two", "--updates", 100000])),
            stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in (0, 1)
    )  # fmt: skip
    try:
        said = [first.stderr.readline()]
        while "update 3 " not in said[-1] and said[-1]:
            said.append(first.stderr.readline())
        second.send_signal(signal.SIGTERM)
        text, other = "".join(said) + first.communicate(timeout=120)[1], second.communicate(timeout=120)[1]
    finally:
        first.kill()
        second.kill()
    (stopped,) = map(int, re.findall(r"stopped at update (\d+); run the same command to go on", text))
    assert "2 processes, 4 rows in an update" in text and "update" not in other, other
    assert checkpoint.read_config(tmp_path / "two")["metrics"]["updates"] == stopped >= 3
    one = coral(*train, "--set", "accumulate=2", "--output", tmp_path / "two", "--updates", stopped + 1)
    assert one.code == 0 and f"going on after update {stopped}" in one.err
    one = coral(*train, "--set", "accumulate=2", "--output", tmp_path / "one", "--updates", stopped + 1)
    assert one.code == 0, one.err
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_device_map_places_the_target(tmp_path):
    """Stops: features or embeddings that stay where a layer was, and weights read while offloaded."""
    save_target(tmp_path / "target")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu",
              "model.layers.1": "disk", "model.norm": "cpu", "lm_head": "cpu"}  # fmt: skip
    placed = Target.load(tmp_path / "target", device_map=places)
    assert any(parameter.is_meta for parameter in placed.model.parameters())
    whole = Target.load(tmp_path / "target")
    rows = [{"input_ids": list(range(9, 30)), "loss_mask": [True] * 21, "document_starts": starts}
            for starts in ([0], [0, 8])]  # fmt: skip
    for chosen in ([0], [0, 1]):
        batches = [feature_batches.feature_batch(target, rows, chosen) for target in (placed, whole)]
        assert torch.equal(batches[0].features, batches[1].features)
        assert torch.equal(batches[0].embeddings, batches[1].embeddings)
    with pytest.raises(CoralError, match="embedding or LM head is offloaded"):
        Target.load(tmp_path / "target", device_map={**places, "lm_head": "disk"})


@pytest.mark.parametrize(
    ("options", "environment", "reason"),
    [
        (["--device", "cpu", "--device-map", "auto"], {}, "leave one of them out"),
        (["--device-map", "auto"], {"WORLD_SIZE": "2"}, "use --shard-target instead"),
        (["--shard-target"], {}, "start them with accelerate launch"),
        (["--tracker", "wandb"], {}, "pip install wandb"),
        (["--tracker", "paper"], {}, "reports.tracker"),
        ([], {"ACCELERATE_MIXED_PRECISION": "bf16"}, "--set precision=bfloat16"),
    ],
)
def test_what_cannot_work_is_refused(coral, tmp_path, monkeypatch, options, environment, reason):
    """Stops: an option that is silently ignored, or that ends in a traceback of another library."""
    prepare(coral, tmp_path, ["So."])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    train = ("train", "--data", tmp_path / "data", "--target", tmp_path / "target", "--updates", 1)
    result = coral(*train, "--output", tmp_path / "o", *options)
    assert result.code == 2 and reason in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"FSDP_VERSION": "1"}, "add --fsdp_version 2"), ({"FSDP_OFFLOAD_PARAMS": "true"}, "not offloaded")],
)
def test_other_forms_of_fsdp_are_refused(monkeypatch, environment, reason):
    """Stops: a launcher's option that changes nothing."""
    for name, value in (FSDP | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CoralError, match=reason):
        parallel.fsdp_asked()


def test_tensorboard_gets_configuration_and_metrics(tmp_path):
    """Stops: a tracker that is asked for and stays empty."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = replace(TOGETHER, reports=Reports(log_every=1, acceptance_every=4, tracker="tensorboard"))
    run(tmp_path / "drafter", config, acceptance=lambda drafter: {"chain": 1.5})
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "drafter"))
    found.Reload()
    logged = {event.step: event.value for event in found.Scalars("loss")}
    expected = {line["update"]: line["loss"] for line in metrics(tmp_path / "drafter") if "loss" in line}
    assert logged == pytest.approx(expected) and len(logged) == 8
    assert [event.value for event in found.Scalars("acceptance/chain")] == [1.5, 1.5]
    assert {"accuracy/1", "accuracy/3", "learning_rate"} <= set(found.Tags()["scalars"])
    (written,) = (tmp_path / "tensorboard" / "drafter").rglob("hparams.yml")
    assert "loss/top_k_weight: 1.0" in written.read_text()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_are_started_with_the_run(tmp_path, monkeypatch, name):
    """A stand-in for the package: stops a call that accelerate's tracker of that name does not make so."""
    seen = SimpleNamespace(init={}, config={}, lines=[], finished=False)
    module = SimpleNamespace(
        init=lambda **options: seen.init.update(options) or logged,
        config=SimpleNamespace(update=lambda values, **options: seen.config.update(values)),
    )
    logged = SimpleNamespace(
        log=lambda values, step, **options: seen.lines.append(values | {"step": step}),
        finish=lambda: setattr(seen, "finished", True),
    )
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(trackers, "find_spec", lambda package: package == name or None)
    config = replace(TOGETHER, reports=Reports(log_every=1, tracker="all"))
    run(tmp_path / "drafter", config)
    assert seen.init == {"project": "coral", "name": "drafter"} and seen.finished
    assert seen.config.items() >= trackers.flat(asdict(replace(config, precision="float32"))).items()
    assert [line["step"] for line in seen.lines] == list(range(1, 9))
