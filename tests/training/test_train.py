"""The training loop: learns, survives stops and bad batches, and says what it does."""

import io
import json
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tiny_training import tiny_data, tiny_drafter, tiny_target

from coral.drafters import checkpoint, tuned
from coral.drafters.heads import store as heads
from coral.drafters.recurrent.alignment import AlignmentConfig
from coral.drafters.recurrent.losses import LossConfig
from coral.errors import CoralError
from coral.target.record import TargetRecord
from coral.training.loop import train
from coral.training.optimiser import Float32Muon
from coral.training.recipe import Limits, OptimiserConfig, Reports, config_type
from coral.training.reporter import Reporter
from coral.training.schedule import learning_rate
from coral.training.start import new_drafter
from coral.tree import TreeSize

CONFIG = config_type("feature")(
    steps=3,
    noise=0.05,
    batch_size=3,
    accumulate=2,
    loss=LossConfig(top_k_weight=1.0),
    alignment=AlignmentConfig(kind="csra", max_rows=8),
    optimiser=OptimiserConfig(learning_rate=5e-3),
    limits=Limits(updates=8),
    reports=Reports(log_every=1, acceptance_every=4),
)
MUON = {"optimiser": OptimiserConfig(learning_rate=5e-3, matrices="muon")}


def run(output, config=CONFIG, target=None, data=None, **options):
    console = Console(file=io.StringIO())
    outcome = train(target or tiny_target(), data or tiny_data(), output, config, console=console, **options)
    return outcome, console.file.getvalue()


def metrics(output):
    lines = (output / "coral" / "training" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(output):
    return checkpoint.load(output).state_dict()


def interrupt_at_first(drafter):
    signal.raise_signal(signal.SIGINT)
    return {"chain": 1.0}


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_thirty_updates_on_one_batch_halve_the_loss(tmp_path, precision, matrices):
    """Stops: targets shifted by a row, a loss without gradient, a learning rate that stays at zero."""
    config = replace(
        CONFIG,
        batch_size=4,
        accumulate=1,
        noise=0.0,
        precision=precision,
        limits=Limits(updates=30),
        optimiser=OptimiserConfig(learning_rate=3e-2, gradient_clip=5.0, matrices=matrices),
    )
    run(tmp_path / "o", config, data=tiny_data(rows=4))
    lines = metrics(tmp_path / "o")
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert len(lines[-1]["accuracy"]) == 3 and max(lines[-1]["accuracy"]) <= 1


@pytest.mark.parametrize(
    "options", [{}, {"one_step": 0.7}, {"loss": LossConfig(candidates=16)}, MUON], ids=str
)
def test_resumed_equals_never_stopped(tmp_path, options):
    """Stops: optimiser moments, schedule, draft steps, data position or random draws that restart after a
    stop.
    """
    config = replace(CONFIG, **options)
    run(tmp_path / "whole", config, acceptance=lambda drafter: {"chain": 1.0})
    outcome, said = run(tmp_path / "parts", config, acceptance=interrupt_at_first)
    assert not outcome.finished and outcome.update == 4
    assert "stopped at update 4; run the same command to go on" in said
    outcome, said = run(tmp_path / "parts", config, acceptance=lambda drafter: {"chain": 1.0})
    assert outcome.finished and outcome.update == 8 and "going on after update 4" in said
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    timeless = ("update", "loss", "accuracy", "gradient_norm", "acceptance")
    assert [[line.get(key) for key in timeless] for line in metrics(tmp_path / "whole")] == [
        [line.get(key) for key in timeless] for line in metrics(tmp_path / "parts")
    ]


@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_a_new_drafter_sees_tokens_as_well_as_features(scale, monkeypatch):
    """Stops `fc` from drowning embeddings, which are far smaller than features, in them; or features in
    embeddings that the target's family multiplies first.
    """
    monkeypatch.setattr("coral.drafters.feature.network.embedding_scale", lambda config: scale)
    target = tiny_target()
    target.model.get_input_embeddings().weight.data.mul_(0.01)
    target.model.model.norm.weight.data.mul_(5)
    drafter = new_drafter(target, CONFIG, tiny_data().dataset)
    ids = torch.arange(31)[None]
    embeddings, features = target.embed(ids), target.states(ids)
    assert embeddings.std() < features.std() / 300
    token, feature = (
        drafter.inputs(a, b).square().mean()
        for a, b in ((embeddings, 0 * features), (0 * embeddings, features))
    )
    assert 0.3 < token < 0.8 and 0.3 < feature < 0.8


def test_one_step_comes_first(tmp_path):
    """Stops a part with one draft step that is too long, too short or never ends."""
    _, said = run(tmp_path / "o", replace(CONFIG, one_step=0.5))
    learnt = [sum(x > 0 for x in line["regression"]) for line in metrics(tmp_path / "o")]
    assert learnt == [1] * 4 + [3] * 4
    assert said.count("top-1") == 8


def test_a_signal_is_ours_only_while_training(tmp_path):
    """Stops: Ctrl-C being swallowed after training has ended."""
    before = signal.getsignal(signal.SIGINT)
    run(tmp_path / "o", acceptance=interrupt_at_first)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_changed_run_is_not_resumed(tmp_path):
    """Stops: two configurations mixed in one checkpoint; only limits, reports and what
    saves memory may change."""
    run(tmp_path / "o")
    with pytest.raises(CoralError, match=r"started with loss.top_k_weight=1.0, now it is 0.5"):
        run(tmp_path / "o", replace(CONFIG, loss=LossConfig(top_k_weight=0.5)))
    with pytest.raises(CoralError, match="started on 24 rows of data, now there are 5"):
        run(tmp_path / "o", data=tiny_data(rows=5))
    with pytest.raises(CoralError, match="started on other data of as many rows"):
        run(tmp_path / "o", data=tiny_data(seed=1))
    more = replace(CONFIG, limits=Limits(updates=10), checkpoint_steps=True, head_chunk=4)
    outcome, _ = run(tmp_path / "o", more)
    assert outcome.update == 10
    outcome, _ = run(tmp_path / "o", replace(CONFIG, steps=2, limits=Limits(updates=2)), resume=False)
    assert outcome.update == 2


class Poisoned:
    """A target whose features are not finite for rows that start with token 0."""

    def __new__(cls):
        target = tiny_target()
        clean = target.states

        def states(input_ids, document_starts=None, layers=(-1,)):
            found = clean(input_ids, document_starts, layers)
            found[input_ids[:, 0] == 0] = float("nan")
            return found

        target.states = states
        return target


def poisoned_data(bad):
    data = tiny_data(rows=24)
    for index, row in enumerate(data.dataset):
        row["input_ids"][0] = 0 if index in bad else 1
    return data


def test_a_batch_that_is_not_finite_is_skipped_and_reported(tmp_path):
    """Stops: one bad record turning all weights into NaN, and nobody knowing which record."""
    config = replace(CONFIG, limits=Limits(updates=4), reports=Reports(log_every=1))
    outcome, said = run(tmp_path / "o", config, Poisoned(), poisoned_data({7}))
    assert outcome.skipped == 1 and "skipped: loss or gradient not finite on rows" in said
    reported = said.split("on rows [")[1].split("]")[0].split(", ")
    assert "7" in reported and len(reported) == 6
    assert len(metrics(tmp_path / "o")) == 3
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "o").values())


def test_a_run_of_bad_batches_ends_the_run(tmp_path):
    """Stops: hours of skipping, and a checkpoint that is replaced by a bad one."""
    with pytest.raises(CoralError, match="10 updates in a row had no finite loss"):
        run(tmp_path / "o", replace(CONFIG, limits=Limits(updates=20)), Poisoned(), poisoned_data(range(24)))
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "o").values())


def test_output_is_a_loadable_drafter_with_its_history(tmp_path):
    """Stops: a run whose result cannot be traced to its recipe, and measurements that reach no file."""
    target = tiny_target()
    lengths = iter([1.5, 2.5])
    run(
        tmp_path / "o",
        target=target,
        acceptance=lambda drafter: {"chain": next(lengths), "training": drafter.training},
    )
    checkpoint.load(tmp_path / "o", target)
    ours = checkpoint.read_config(tmp_path / "o")
    assert ours["recipe"]["loss"]["top_k_weight"] == 1.0
    assert ours["metrics"]["updates"] == 8
    assert ours["metrics"]["acceptance"] == {"chain": 2.5, "training": False}
    measured = [line["acceptance"]["chain"] for line in metrics(tmp_path / "o") if "acceptance" in line]
    assert measured == [1.5, 2.5]
    assert [path.name for path in (tmp_path / "o").glob("*.safetensors")] == ["model.safetensors"]


def test_other_peoples_files_are_safe(tmp_path):
    """Stops: a training run that replaces the directory it was pointed at by mistake."""
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.txt").write_text("years of work")
    with pytest.raises(CoralError, match="not a drafter"):
        run(tmp_path / "o")
    assert (tmp_path / "o" / "thesis.txt").exists()


def test_accumulated_batches_learn_what_one_large_batch_does(tmp_path):
    """Stops: a mean of means over batches with unequal numbers of trained rows, and an option for memory that
    changes the result.
    """
    plain = replace(CONFIG, noise=0.0, alignment=AlignmentConfig())
    run(tmp_path / "one", replace(plain, batch_size=8, accumulate=1))
    run(tmp_path / "two", replace(plain, batch_size=4, accumulate=2))
    run(tmp_path / "less", replace(plain, batch_size=8, accumulate=1, checkpoint_steps=True, head_chunk=3))
    whole = weights(tmp_path / "one")
    for other in (weights(tmp_path / "two"), weights(tmp_path / "less")):
        for name in whole:
            torch.testing.assert_close(other[name], whole[name], rtol=1e-3, atol=1e-4)


def test_data_of_another_tokenizer_is_refused(tmp_path):
    """Stops: an index error from deep inside, or training on the wrong embeddings."""
    with pytest.raises(CoralError, match="the target's own tokenizer"):
        run(tmp_path / "o", data=tiny_data(vocab_size=99))
    with pytest.raises(CoralError, match="no rows"):
        run(tmp_path / "o", data=SimpleNamespace(dataset=[]))


def test_every_row_is_read_once_an_epoch(tmp_path):
    """Stops: rows that are never trained on because the last batch of an epoch is not full."""
    seen = []

    class Recorded(list):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    rows = Recorded(tiny_data(rows=11).dataset)
    data = SimpleNamespace(dataset=rows, info={"digest": "known"})  # so that the rows are not read for it
    config = replace(CONFIG, batch_size=2, accumulate=1, limits=Limits(epochs=2))
    outcome, _ = run(tmp_path / "o", config, data=data)
    assert outcome.update == 11
    assert sorted(seen[-22:-11]) == sorted(seen[-11:]) == list(range(11)) and seen[-22:-11] != seen[-11:]


def test_a_learner_brings_its_own_sums(tmp_path):
    """Stops: reports that know one kind of drafter by heart, and a mean over the rows of another step."""
    (tmp_path / "coral" / "training").mkdir(parents=True)
    sums = {"rows": torch.tensor([8.0, 2.0]), "correct": torch.tensor([4.0, 2.0])}
    sums |= {"depth": torch.tensor([16.0, 5.0]), "balance": torch.tensor(2.0)}
    with Reporter(tmp_path, False, Console(file=io.StringIO())) as reporter:
        reporter.add(1, 0.1, 16.0, sums)
        reporter.add(2, 0.2, 8.0, {name: 0 * part for name, part in sums.items()})
        reporter.log(2, 0.5, seconds=1.0)
        reporter.log(3, 0.6, seconds=1.0)  # nothing was counted since
    (line,) = metrics(tmp_path)
    assert line["loss"] == 3.0 and line["accuracy"] == [0.5, 1.0]
    assert line["depth"] == [2.0, 2.5] and line["balance"] == 0.25


def test_schedule_rises_then_falls():
    """Stops: a first update at full rate, and a rate that never comes down."""
    for decay, last in (("cosine", 0.02), ("linear", 0.02), ("constant", 1.0)):
        options = OptimiserConfig(decay=decay, warmup=0.1)
        rates = [learning_rate(options, x / 100) for x in range(101)]
        assert rates[0] < 1e-4 and max(rates) == rates[10] == 1.0
        assert rates[-1] == pytest.approx(last)


def everything(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_ino) for path in files}


def beside(output):
    """What people and other commands put into the directory of a finished run."""
    target = tiny_target()
    (output / "README.md").write_text("my card")
    heads.save(output, "routed", {"ids": torch.arange(31)[None]}, active=1)
    heads.save(output, "static", {"ids": torch.arange(9)})
    heads.save_token_map(output, torch.arange(9))
    conditions = tuned.Conditions("a CPU", 4, "float32", "native", 2, "static")
    tuned.save(output, conditions, TreeSize(2, 3, 5), 1.5, 1.4)
    return TargetRecord.of(target)


def test_a_finished_run_writes_nothing(tmp_path):
    """Stops: a command repeated by mistake that deletes the heads, the tuned trees and the model card."""
    run(tmp_path / "o", acceptance=lambda drafter: {"chain": 1.0})
    beside(tmp_path / "o")
    before = everything(tmp_path)
    outcome, said = run(tmp_path / "o", acceptance=lambda drafter: 1 / 0)
    assert outcome.finished and outcome.update == 8 and outcome.acceptance == {"chain": 1.0}
    assert "finished before, after update 8" in said and everything(tmp_path) == before


def test_a_longer_run_carries_over_what_it_did_not_write_and_says_what_is_stale(tmp_path):
    """Stops: a checkpoint that takes files of others with it, and a tree tuned to weights that are gone."""
    output = tmp_path / "o"
    run(output)
    record = beside(output)
    before = everything(output)
    assert checkpoint.outdated(output, record) is not None
    _, said = run(output, replace(CONFIG, limits=Limits(updates=9)))
    after = everything(output)
    lost = before.keys() - after.keys()
    kept = [name for name in before if "heads" in name or name == "README.md"]
    assert lost == {"coral/trees.json"} and len(kept) == 5
    assert all(after[name] == before[name] for name in kept)
    assert "trees.json is dropped (run `coral tune` again); the heads routed stay (make them again" in said
    assert [line["update"] for line in metrics(output)] == list(range(1, 10))
    run(output, replace(CONFIG, steps=2, limits=Limits(updates=2)), resume=False)
    assert everything(output).keys() == after.keys()
    assert [line["update"] for line in metrics(output)] == [1, 2]
    other = tiny_target(seed=7)
    assert "routed, static are dropped" in checkpoint.outdated(output, TargetRecord.of(other))
    run(output, target=other, resume=False)
    assert not heads.made(output) and (output / "README.md").exists()


def spoil(drafter):
    with torch.no_grad():
        drafter.fc.weight[0, 0] = float("nan")
    return {"chain": 1.0}


def test_weights_that_are_not_finite_are_no_result(tmp_path):
    """Stops: a run that ends in NaN and says that it finished, and a good checkpoint that it replaces."""
    run(tmp_path / "o", replace(CONFIG, limits=Limits(updates=3)))
    before = everything(tmp_path)
    config = replace(CONFIG, limits=Limits(updates=6))
    with pytest.raises(CoralError, match=r"after update 6 the weights fc\.weight are not finite.*keeps the"):
        run(tmp_path / "o", config, acceptance=spoil)
    after = everything(tmp_path)
    log = "o/coral/training/metrics.jsonl"
    assert {**before, log: 0} == {**after, log: 0}
    run(tmp_path / "o", config)
    with pytest.raises(CoralError, match="none of 4 updates had a finite loss"):
        run(tmp_path / "p", replace(CONFIG, limits=Limits(updates=4)), Poisoned(), poisoned_data(range(24)))
    drafter = tiny_drafter()
    spoil(drafter)
    with pytest.raises(CoralError, match=r"fc\.weight is not finite"):
        checkpoint.save(drafter, tmp_path / "d", target=TargetRecord.of(tiny_target()))
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (9, 9)])
def test_muon_in_float32_is_muon(shape: tuple[int, int]) -> None:
    """Stops another step, size or state than torch's, whose products are in bfloat16: a run may go on with
    the other one on another machine.
    """
    torch.manual_seed(0)
    first = torch.randn(shape)
    matrices = [torch.nn.Parameter(first.clone()) for _ in range(2)]
    options = {"lr": 0.1, "weight_decay": 0.01, "adjust_lr_fn": "match_rms_adamw"}
    ours, theirs = Float32Muon([matrices[0]], **options), torch.optim.Muon([matrices[1]], **options)
    for _ in range(3):
        gradient = torch.randn(shape)
        for matrix, muon in zip(matrices, (ours, theirs), strict=True):
            matrix.grad = gradient.clone()
            muon.step()
    moved = [matrix.detach() - first for matrix in matrices]
    torch.testing.assert_close(moved[0], moved[1], rtol=0.03, atol=0.03 * float(moved[1].abs().max()))
    theirs.load_state_dict(ours.state_dict())


def test_an_update_that_reads_little_data_very_often_is_refused(tmp_path):
    """Stops a run that never ends its first update, or ends for want of memory, of a mistyped batch size."""
    for large in ({"batch_size": 1_000_000}, {"accumulate": 1_000_000}):
        with pytest.raises(CoralError, match=r"an update would read \d,000,000 rows.*lower batch_size"):
            run(tmp_path / "run", replace(CONFIG, **large))
    assert not (tmp_path / "run").exists()
