"""Stored features: training from them is training live, and a stopped job goes on or says why not."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from test_train import CONFIG, interrupt_at_first, run, weights
from tiny_training import tiny_data, tiny_info, tiny_target

from coral.data import fp8, shards, write_shards
from coral.data.features import feature_batch
from coral.data.prepare import PrepareConfig, prepare
from coral.data.prepared import PreparedData
from coral.errors import CoralError
from coral.target.target import Target
from coral.training.recipe import Limits


def data(rows=24, seed=0):
    return PreparedData(tiny_data(rows, seed=seed).dataset, [[1, 2]], tiny_info(rows))


def store(output, rows=24, seed=0, target=None, **options):
    form = {name: options.pop(name) for name in ("layers", "dtype") if name in options}
    form = shards.Form(**{"shard_rows": options.pop("shard_rows", 5), **form})
    return write_shards.store(
        target or tiny_target(), data(rows, seed), output, form, **{"batch_size": 2, **options}
    )


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def shard_contents(directory):
    return {path.name: path.read_bytes() for path in directory.rglob("*.safetensors")}


class WithoutLayers:
    """A target that can embed and score, but whose layers must not run."""

    def __new__(cls):
        target = tiny_target()

        def states(*_):
            raise AssertionError("the target ran, although its features are stored")

        target.states = states
        return target


def test_training_from_shards_is_training_live(tmp_path):
    """Stops: features of another row or off by one, another cut or padding of the batches, a target that runs
    all the same.

    The target read other batches when the features were stored, which may round the last bits of float32
    differently; so the weights are compared closely, not bitwise.
    """
    live, stored = replace(CONFIG, limits=Limits(updates=4)), tmp_path / "features"
    store(stored, dtype="float32")
    run(tmp_path / "live", live)
    outcome, _ = run(tmp_path / "stored", live, WithoutLayers(), shards.load(stored))
    assert outcome.finished
    ours, theirs = weights(tmp_path / "stored"), weights(tmp_path / "live")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_the_same_features_give_the_same_weights(tmp_path):
    """Stops: anything but the features' last bits making the difference; here they are equal, and so is the
    run, bit for bit.
    """
    target, examples = tiny_target(), []
    store(tmp_path / "features", dtype="float32")
    rows = shards.load(tmp_path / "features").dataset
    for row, example in enumerate(data().dataset):
        own = feature_batch(target, [example], [0]).features
        torch.testing.assert_close(rows[row]["states"], own, rtol=1e-5, atol=1e-6)
        examples.append({**example, "states": rows[row]["states"]})
    run(tmp_path / "a", data=SimpleNamespace(dataset=rows))
    run(tmp_path / "b", data=SimpleNamespace(dataset=examples))
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_training_goes_on_from_shards(tmp_path):
    """Stops: a resumed run that reads other rows than one that was never stopped."""
    store(tmp_path / "features")
    stored = shards.load(tmp_path / "features")
    run(tmp_path / "whole", data=stored, acceptance=lambda drafter: {"chain": 1.0})
    outcome, _ = run(tmp_path / "parts", data=stored, acceptance=interrupt_at_first)
    assert not outcome.finished
    stored = shards.load(tmp_path / "features")
    run(tmp_path / "parts", data=stored, acceptance=lambda drafter: {"chain": 1.0})
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_bfloat16_is_the_live_feature_rounded(tmp_path):
    """Stops: features that are scaled, cut or cast twice on their way to the disk and back."""
    target = tiny_target()
    stored = store(tmp_path / "features", rows=6, shard_rows=4, batch_size=2)
    for rows in ([0, 1], [2, 3], [4, 5]):  # as they were stored, so that nothing else rounds
        live, back = (feature_batch(target, dataset, rows) for dataset in (data(6).dataset, stored))
        assert torch.equal(live.input_ids, back.input_ids) and torch.equal(live.loss_mask, back.loss_mask)
        assert torch.equal(live.embeddings, back.embeddings) and back.document_starts is None
        for i, row in enumerate(rows):
            length = len(stored[row]["input_ids"])
            expected = live.features[i, :length].bfloat16()
            assert torch.equal(back.features[i, :length], expected.float())
            assert stored[row]["states"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "fp8"])
def test_states_from_within_the_target_come_back(tmp_path, dtype):
    """Stops: states of another layer or in another order, and states that nobody asked for."""
    target, live = tiny_target(), data(6).dataset
    stored = store(tmp_path / "features", rows=6, layers=(1, 0), dtype=dtype)
    for joined in (False, True):
        for inner in ((0,), (0, 1)):
            own = feature_batch(target, live, [4, 2], inner, joined=joined)
            back = feature_batch(target, shards.with_inner(stored, inner), [4, 2], inner, joined=joined)
            close = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 0.07, "atol": 1e-2}
            for row in range(len(own.inner)):
                there = back.features[row].abs().sum(-1) > 0  # the padding is zeros
                assert back.inner.shape == own.inner.shape and there.sum() > 5
                torch.testing.assert_close(back.inner[row, there], own.inner[row, there].float(), **close)
                torch.testing.assert_close(back.features[row, there], own.features[row, there], **close)
    assert feature_batch(target, shards.with_inner(stored, ()), [0]).inner is None
    assert shards.load(tmp_path / "features").dataset.form.layers == (1, 0)
    with pytest.raises(CoralError, match=r"no states of layer 5; store them with .* --layers 5,1`"):
        shards.with_inner(stored, (5, 1))


def test_packed_rows_are_cut_and_keep_their_documents(tmp_path):
    """Stops: documents of a packed row running into each other, and tokens stored that nobody trains on."""
    torch.manual_seed(0)
    target = Target(tiny_target().model, name="tiny")
    ids = [int(x) for x in torch.randint(0, 31, (12,))]
    mask = [i in (3, 7, 8) for i in range(12)]
    row = {"input_ids": ids, "loss_mask": mask, "document_starts": [0, 5]}
    packed = PreparedData([row, {**row, "document_starts": [0], "loss_mask": [False] * 12}], [], {})
    stored = write_shards.store(target, packed, tmp_path / "features", shards.Form("float32"))
    assert stored[0]["states"].shape == (1, 9, 16) and stored[0]["document_starts"].tolist() == [0, 5]
    assert stored[1]["states"].shape == (1, 0, 16)  # nothing is trained on
    live, back = (feature_batch(target, dataset, [0]) for dataset in (packed.dataset, stored))
    torch.testing.assert_close(live.features, back.features, rtol=1e-5, atol=1e-6)
    assert torch.equal(live.document_starts, back.document_starts)
    alone = feature_batch(target, [{**row, "input_ids": ids[5:], "loss_mask": mask[5:]}], [0])
    torch.testing.assert_close(back.features[0, 5:9], alone.features[0, :4], rtol=1e-4, atol=1e-5)


def test_one_row_is_read_at_a_time(tmp_path):
    """Stops: a reader that loads whole shards, and an iteration that never ends."""
    stored = store(tmp_path / "features", rows=7)
    assert len(list(stored)) == 7
    assert torch.equal(stored[-1]["states"], stored[6]["states"])
    with safe_open(stored.shard(1), "pt") as shard:
        assert len(shard.keys()) == 2 * 4  # rows 5 and 6


def test_a_stopped_job_goes_on(tmp_path, monkeypatch):
    """Stops: shards that are computed twice, and a job whose result depends on where it was stopped."""
    store(tmp_path / "whole")
    read = []
    real = write_shards.feature_batch

    def interrupted(target, dataset, rows, *layers, **options):
        read.extend(rows)
        if len(read) == 14:  # in the middle of the third shard
            raise KeyboardInterrupt
        return real(target, dataset, rows, *layers, **options)

    monkeypatch.setattr(write_shards, "feature_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "parts")
    assert len(contents(tmp_path / "parts")) == 3  # the manifest and two shards
    (tmp_path / "parts" / ".features-00003-of-00005.safetensors.1").write_bytes(b"of a killed process")
    with pytest.raises(CoralError, match=r"lacks 3 of its 5 shards, features-00003-of-00005\.safetensors"):
        shards.load(tmp_path / "parts")
    read.clear()
    read.extend(range(100))  # never interrupted again
    store(tmp_path / "parts")
    assert read[100:] == list(range(10, 24))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_torn_shard_is_named_and_written_again(tmp_path):
    """Stops: training on what a full disk or a broken copy has left of a shard."""
    stored = store(tmp_path / "features")
    before = contents(tmp_path / "features")
    torn = stored.shard(2)
    torn.write_bytes(torn.read_bytes()[:-7])
    with pytest.raises(CoralError, match=f"lacks 1 of its 5 shards, {torn.name}; run the same"):
        shards.load(tmp_path / "features")
    with pytest.raises(CoralError, match=f"{torn.name} cannot be read"):
        stored[12]
    store(tmp_path / "features")
    assert contents(tmp_path / "features") == before


def test_several_writers_share_the_work(tmp_path):
    """Stops: shards that two processes write or none, and a folder that depends on who wrote it."""
    store(tmp_path / "one")
    store(tmp_path / "three", part=(2, 3))
    with pytest.raises(CoralError, match=r"lacks 3 of.*-00001.*-00003.*-00004.*\(of --shard 1/3, 3/3\)"):
        shards.load(tmp_path / "three")
    for i in (1, 3):
        store(tmp_path / "three", part=(i, 3))
    assert shard_contents(tmp_path / "three") == shard_contents(tmp_path / "one")
    with pytest.raises(CoralError, match="part 3/2 within 1/2"):
        store(tmp_path / "three", part=(3, 2))


def test_writers_may_run_at_once_and_have_the_same_process_id(tmp_path):
    """Stops: processes of two containers, both number 7, that take each other's file away while it is
    written.
    """
    target = tiny_target()
    with ThreadPoolExecutor(4) as pool:  # of one process id
        jobs = [
            pool.submit(store, tmp_path / "four", target=target, shard_rows=1, part=(i, 4))
            for i in (1, 2, 3, 4)
        ]
        for job in jobs:
            job.result()
    store(tmp_path / "one", target=target, shard_rows=1)
    assert shard_contents(tmp_path / "four") == shard_contents(tmp_path / "one")


def test_parts_in_directories_of_their_own_are_one(tmp_path):
    """Stops: nodes without a common disk that cannot share the work, and parts of two jobs taken for one."""
    store(tmp_path / "one")
    for i in (1, 2, 3):
        store(tmp_path / "all" / f"node-{i}", part=(i, 3))
    assert len(shard_contents(tmp_path / "all" / "node-2")) == 2
    whole, merged = (shards.load(tmp_path / name) for name in ("one", "all"))
    assert (merged.held_out_prompts, merged.info) == (whole.held_out_prompts, whole.info)
    for row in range(24):
        assert torch.equal(merged.dataset[row]["states"], whole.dataset[row]["states"])
    run(tmp_path / "o", replace(CONFIG, limits=Limits(updates=1)), data=merged)
    shutil.rmtree(tmp_path / "all" / "node-1")
    with pytest.raises(CoralError, match=r"all lacks 2 of its 5 shards.*-00001.*-00004.*\(of --shard 1/3\)"):
        shards.load(tmp_path / "all")
    store(tmp_path / "all" / "other", dtype="float32", part=(1, 3))
    with pytest.raises(CoralError, match=r"other were begun with dtype float32, here it is bfloat16; move"):
        shards.load(tmp_path / "all")
    with pytest.raises(CoralError, match="no prepared data directory"):
        (tmp_path / "empty").mkdir()
        shards.load(tmp_path / "empty")


def test_a_part_needs_room_for_itself_alone(tmp_path, monkeypatch):
    """Stops: a node that refuses its quarter because the whole does not fit on its disk."""
    store(tmp_path / "measured")
    used = sum(map(len, contents(tmp_path / "measured").values()))
    monkeypatch.setattr(write_shards.shutil, "disk_usage", lambda path: SimpleNamespace(free=used * 0.6))
    store(tmp_path / "node", part=(2, 2))
    with pytest.raises(CoralError, match="make room"):
        store(tmp_path / "features")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(-12, 12), st.integers(1, 300))
def test_fp8_keeps_every_token_at_its_own_size(seed, power, width):
    """Stops: one scale for all tokens, or none: a small token becomes zeros, a large one infinite."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1.0, 10.0**power, 0.0])
    features = torch.randn(3, width, generator=generator) * sizes[:, None]
    back = fp8.restore(*fp8.quantise(features))
    largest = features.abs().amax(-1, keepdim=True)
    bound = torch.maximum(features.abs() * 2**-4, largest * 2**-18) * 1.001
    assert bool(((back - features).abs() <= bound).all())


def test_training_from_fp8(tmp_path):
    """Stops: quantised numbers that are read without their scales, and a file that is no smaller."""
    target, exact = tiny_target(hidden_size=64), tmp_path / "exact"
    for dtype, name in (("float32", "exact"), ("fp8", "fp8")):
        store(tmp_path / name, dtype=dtype, target=target)
    rows, near = (shards.load(tmp_path / name).dataset for name in ("exact", "fp8"))
    for row in range(24):
        error = (near[row]["states"] - rows[row]["states"]).norm() / rows[row]["states"].norm()
        assert 0.005 < error < 0.04 and near[row]["states"].dtype == torch.float32
    sizes = [sum(map(len, shard_contents(path).values())) for path in (exact, tmp_path / "fp8")]
    tokens = sum(len(row["input_ids"]) for row in near)
    assert sizes[0] - sizes[1] == pytest.approx(tokens * (64 * 3 - 4), rel=0.05)
    run(tmp_path / "o", replace(CONFIG, limits=Limits(updates=1)), target, shards.load(tmp_path / "fp8"))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"target": tiny_target(seed=7)}, "those of the target tiny, but tiny has other weights"),
        ({"target": tiny_target(hidden_size=20)}, "those of the target tiny"),
        ({"layers": (1,)}, r"begun with layers .., here it is .1."),
        ({"rows": 23}, "features of other data \\(24 rows, here are 23"),
        ({"seed": 1}, "features of other data"),
        ({"dtype": "float32"}, "begun with dtype bfloat16, here it is float32"),
        ({"shard_rows": 6}, "begun with shard_rows 5, here it is 6"),
        ({"dtype": "float8"}, "cannot be stored as 'float8'"),
    ],
)
def test_another_job_does_not_go_on_there(tmp_path, other, message):
    """Stops: one folder with the features of two targets, two sets of data or two dtypes."""
    store(tmp_path / "features")
    before = contents(tmp_path / "features")
    with pytest.raises(CoralError, match=message):
        store(tmp_path / "features", **other)
    assert contents(tmp_path / "features") == before


def test_another_target_does_not_train_from_them(tmp_path):
    """Stops: a drafter that learns the features of one target and the LM head of another."""
    stored = PreparedData(store(tmp_path / "features"), [], {})
    with pytest.raises(CoralError, match="use that target, or store the features of this one"):
        run(tmp_path / "o", target=tiny_target(seed=7), data=stored)
    assert not (tmp_path / "o").exists()
    moved = tiny_target()
    moved.name = "moved/elsewhere"  # the same weights under another name are the same target
    run(tmp_path / "o", replace(CONFIG, limits=Limits(updates=1)), target=moved, data=stored)


def test_a_disk_that_is_too_small_is_refused_first(tmp_path, monkeypatch):
    """Stops: hours of computing that end in a full disk, and a need that is counted without what is there."""
    target, free = tiny_target(), []
    monkeypatch.setattr(write_shards.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[-1]))
    free.append(10**9)
    store(tmp_path / "measured")
    used = sum(map(len, contents(tmp_path / "measured").values()))
    free.append(used // 2)
    with pytest.raises(CoralError, match=r"need .* kB, but .* has .* free; make room"):
        store(tmp_path / "features", target=target)
    assert not (tmp_path / "features").exists()
    free.append(0)
    store(tmp_path / "measured")  # all is there, nothing is needed
    tokens = sum(len(row["input_ids"]) for row in data().dataset)
    said = sum(write_shards._measure(data().dataset, 16 * 2, None)[1])
    assert 0.8 * said < used - len((tmp_path / "measured" / "features.json").read_bytes()) <= said
    assert said > tokens * 32


def test_other_peoples_files_are_safe(tmp_path):
    """Stops: shards written among the files of a directory that was named by mistake."""
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.txt").write_text("years of work")
    with pytest.raises(CoralError, match="holds other files"):
        store(tmp_path / "o")
    with pytest.raises(CoralError, match="is a file, but"):
        store(tmp_path / "o" / "thesis.txt")
    with pytest.raises(CoralError, match="no rows"):
        write_shards.store(tiny_target(), PreparedData([], [], {}), tmp_path / "p")
    assert contents(tmp_path / "o") == {"thesis.txt": b"years of work"}


def test_a_broken_or_newer_manifest_is_refused(tmp_path):
    """Stops: a traceback from a half-copied folder, and an old version misreading a new format."""
    store(tmp_path / "features")
    path = tmp_path / "features" / "features.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"format_version": 2}))
    with pytest.raises(CoralError, match="has format 2, this version reads 1"):
        shards.load(tmp_path / "features")
    path.write_text("{")
    with pytest.raises(CoralError, match=r"features\.json cannot be read"):
        store(tmp_path / "features")


@pytest.mark.slow
def test_the_commands_work_together(coral, models, tmp_path):
    """Stops: a folder that `train` or `train-head` cannot read, and the options that reach nothing."""
    said = [
        {"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": "say " * i}]}
        for i in range(1, 8)
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in said))
    target = models / "target"
    prepare(
        [tmp_path / "c.jsonl"], Target.load(target).tokenizer, tmp_path / "data", PrepareConfig(held_out=1)
    )
    command = ("data", "features", tmp_path / "data", "--target", target, "--output", tmp_path / "features")
    for shard in ("1/2", "2/2"):
        result = coral(*command, "--shard-rows", 2, "--shard", shard)
        assert result.code == 0 and "features of 6 rows in 3 shards" in result.out, result.err
        assert " to write (all parts: " in result.err or " to write, " in result.err
        assert " free: " in result.err
    assert "write it as I/N" in coral(*command, "--shard", "2").err
    assert "write numbers from 0 to 1" in coral(*command, "--layers", "1,2").err
    assert "other weights" in coral(*command[:4], models / "other", *command[5:], "--shard-rows", 2).err
    common = ("--data", tmp_path / "features", "--target", target, "--updates", 2)
    result = coral("train", *common, "--output", tmp_path / "drafter")
    assert result.code == 0 and "acceptance length" in result.err, result.err
    head = coral("train-head", tmp_path / "drafter", *common, "--groups", 4, "--active", 1)
    assert head.code == 0, head.err
    next(tmp_path.glob("features/*-00002-*")).unlink()
    missing = coral("train", *common, "--output", tmp_path / "drafter")
    assert missing.code == 2 and "lacks 1 of its 3 shards, features-00002-of-00003" in missing.err
