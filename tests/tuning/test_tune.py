"""`coral tune`: what it predicts is what decoding does, and what it finds is used."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from test_cli import conversations

import coral as library
from coral.bench.deepen import append_layers
from coral.bench.run import bench
from coral.bench.settings import BenchConfig
from coral.data.prepare import PrepareConfig, prepare
from coral.decoding.cycle import acceptance_length, generate
from coral.decoding.sampling import Sampling
from coral.drafters import checkpoint, tuned
from coral.drafters.heads import store as heads
from coral.errors import CoralError
from coral.target.record import TargetRecord
from coral.target.target import Target
from coral.tree import CPU_DEFAULT, DEFAULT, LOOKUP_NODES, DraftTree, TreeSize
from coral.tuning import cycle_costs
from coral.tuning.cycle_costs import CycleCosts, measure_cycles, that_may_pay
from coral.tuning.recording import Text, everything, new_state, record
from coral.tuning.search import MIN_GAIN, Prediction, fastest, grid
from coral.tuning.simulate import Simulated, simulate

POOL = everything(4, 6, 0.0)
NEW = 30
IDS = 8  # so few that a random drafter's four children often hold what the target writes
PROMPTS = [tiny.prompt_of(length, IDS) for length in (5, 9, 2)]


def decoded(target, proposer, tree_size, sampling):
    """The cycles of really decoding all prompts."""
    cycles = []
    for index, prompt in enumerate(PROMPTS):
        state = new_state(target, prompt, NEW, sampling, index, tree_size.num_nodes)
        cycles += [cycle for (cycle,) in generate(target, proposer, [state], tree_size)]
    return cycles


@pytest.fixture(scope="module", params=[0.0, 1.0], ids=["greedy", "sampled"])
def recorded(request):
    target, sampling = tiny.soft_target(IDS), Sampling(request.param, seed=4)
    proposer = tiny.random_drafter(target)
    return target, proposer, sampling, record(target, proposer, PROMPTS, NEW, sampling, POOL)


@pytest.mark.parametrize(
    "tree_size",
    [
        TreeSize(4, 6, 15, 0.0),
        TreeSize(4, 6, 40, 0.3),
        TreeSize(4, 3, 7, 0.2),
        TreeSize(4, 1, 2, 0.0),
        TreeSize(4, 5, 3, 0.25),
    ],
    ids=str,
)
def test_simulation_is_decoding(recorded, tree_size: TreeSize) -> None:
    """Stops a growth, rerank or walk on paper that differs from the real one in a single node."""
    target, proposer, sampling, texts = recorded
    cycles = decoded(target, proposer, tree_size, sampling)
    (run,) = simulate(texts, [tree_size])
    assert acceptance_length(cycles) > 1.1  # otherwise nothing is tested
    assert run.tau == pytest.approx(acceptance_length(cycles), abs=1e-6)
    assert (run.tokens, run.cycles) == (sum(len(c.tokens) for c in cycles), len(cycles))
    assert run.steps == sum(c.num_forwards for c in cycles)
    rows = torch.bincount(torch.tensor([c.num_drafted + 1 for c in cycles]))
    assert torch.equal(run.rows, rows)


def test_smaller_top_k_are_cut_from_the_same_record(recorded) -> None:
    """Stops children or levels of the recorded width in a narrower tree."""
    target, proposer, sampling, texts = recorded
    for tree_size in (TreeSize(1, 6, 6, 0.0), TreeSize(2, 4, 9, 0.1), TreeSize(3, 6, 15, 0.2)):
        cycles = decoded(target, proposer, tree_size, sampling)
        (run,) = simulate(texts, [tree_size])
        assert run.tau == pytest.approx(acceptance_length(cycles), rel=0.03)
        assert run.steps == pytest.approx(sum(c.num_forwards for c in cycles), rel=0.1)


def test_an_end_inside_the_path_cuts_the_cycle() -> None:
    """Stops a tau that counts tokens which the end of the text threw away."""
    chain = DraftTree(torch.tensor([9, 1, 2, 3]), torch.tensor([-1, 0, 1, 2]), -torch.arange(4.0), 3)
    ended = Text([1, 2], [chain, DraftTree.root(1)], room=10)  # 2 ends it
    going = Text([1, 2, 7], [chain, chain, chain], room=3)
    for texts, tau, cycles in (([going], 3.0, 1), ([ended, going], 3.0, 2)):
        (run,) = simulate(texts, [TreeSize(1, 3, 3)])
        assert (run.tau, run.cycles, run.tokens) == (tau, cycles, sum(len(t.tokens) for t in texts))
    (run,) = simulate([going], [TreeSize(1, 1, 3)])
    assert (run.tau, run.steps, run.rows.tolist()) == (1.5, 1, [0, 1, 1])  # the last token needs no draft


def test_costs_add_up() -> None:
    """Stops a compiled target's small trees from being cheaper than its large ones, and odd sizes between."""
    costs = CycleCosts({1: 1.0, 2: 0.8, 4: 2.0}, {3: 0.5}, {3: 0.25}, padded=False)
    assert costs.plain == 1.0
    assert (costs.of_rows(1), costs.of_rows(3), costs.of_rows(4), costs.of_rows(6)) == (1.0, 1.4, 2.0, 3.2)
    run = Simulated(TreeSize(3, 2, 3), 9, 3, 3.0, 5, torch.tensor([0, 1, 0, 2]))
    drafting = 3 * 0.5 + 2 * 0.25
    assert costs.seconds(run) == pytest.approx(1.0 + 2 * 1.4 + drafting)
    assert replace(costs, padded=True).seconds(run) == pytest.approx(1.0 + 2 * 2.0 + drafting)


def test_measured_costs_are_there() -> None:
    """Stops a size that is asked for and not timed, also where the context leaves little room."""
    target = tiny.tiny_target()
    costs = measure_cycles(
        target, tiny.random_drafter(target), tiny.prompt_of(60), Sampling(1.0), (1, 2, 8), (1, 4), 20
    )
    assert costs.cycle.keys() == {1, 2, 8} and costs.first.keys() == costs.level.keys() == {1, 4}
    assert min(*costs.cycle.values(), *costs.first.values()) > 0 and not costs.padded


def test_sizes_that_cannot_pay_are_not_timed(monkeypatch) -> None:
    """Stops minutes of timing trees whose cycle takes longer than all the tokens that it could yield."""
    asked = []

    def seconds(target, prompt, sampling, rows, repeats):
        asked.append(rows)
        return {n: 0.5 + 0.5 * n for n in rows}

    monkeypatch.setattr(cycle_costs, "_cycle_seconds", seconds)
    given = tiny.tiny_target(), tiny.prompt_of(5), Sampling()
    assert that_may_pay(*given, (1, 2, 4, 8, 16), 2.0) == (1, 2, 4) and asked == [(1, 2), (1, 4)]
    assert that_may_pay(*given, (1, 2, 4), 99.0) == (1, 2, 4)


def test_the_grid_and_its_best() -> None:
    """Stops a table without the built-in tree, and one that shows five variants of the same tree."""
    tree_sizes = grid(31)
    assert {DEFAULT, CPU_DEFAULT} <= {*tree_sizes} and len(tree_sizes) == len(set(tree_sizes)) > 1000
    assert all(b.num_nodes <= min(31, b.top_k + (b.max_depth - 1) * b.top_k**2) for b in tree_sizes)
    assert all(b.min_gain in MIN_GAIN for b in tree_sizes)
    found = fastest([
        Prediction(TreeSize(k, 2, nodes), 2.0, 1.0, filled, 10.0, speedup)
        for k, nodes, filled, speedup in (
            (1, 2, 1.5, 1.5), (2, 2, 1.8, 1.7), (2, 9, 2.5, 1.6), (2, 4, 2.5, 1.6), (4, 4, 2.5, 1.4)
        )
    ])  # fmt: skip
    assert [(p.speedup, p.tree_size.num_nodes) for p in found] == [(1.7, 2), (1.6, 4)]


# ------------------------------------------------------------------------------------------- trees.json


CONDITIONS = tuned.Conditions("a CPU", 4, "float32", "native", 8, "full")
TREE = TreeSize(2, 3, 5)


def test_lookup_by_conditions(tmp_path: Path) -> None:
    """Stops a tree of another machine or head from being used, and one entry that replaces another."""
    assert tuned.find(tmp_path, CONDITIONS) is None
    others = {
        name: replace(CONDITIONS, **{name: value})
        for name, value in {"device": "a GPU", "threads": 1, "dtype": "bfloat16", "backend": "graphs",
                            "layers": 32, "head": "static"}.items()
    }  # fmt: skip
    path = tuned.save(tmp_path, CONDITIONS, TREE, 1.5, 1.4)
    assert all(tuned.find(tmp_path, other) is None for other in others.values())
    for n, other in enumerate(others.values()):
        tuned.save(tmp_path, other, replace(TREE, num_nodes=n + 6), 1.5, 1.4)
    tuned.save(tmp_path, CONDITIONS, replace(TREE, top_k=9), 1.6, 1.5)
    assert tuned.find(tmp_path, CONDITIONS) == replace(TREE, top_k=9)
    assert len(json.loads(path.read_text())["trees"]) == 7
    tuned.forget(tmp_path, "static")
    assert tuned.find(tmp_path, others["head"]) is None and tuned.find(tmp_path, CONDITIONS) is not None


@pytest.mark.parametrize("text", ["", "[]", '{"trees": [{}]}', '{"trees": [{"conditions": 3}]}', "\xff"])
def test_a_corrupt_file_says_to_delete_it(tmp_path: Path, text: str) -> None:
    """Stops a broken file from being taken for none, and a traceback."""
    (tmp_path / "coral").mkdir()
    (tmp_path / "coral" / "trees.json").write_bytes(text.encode("latin-1"))
    for attempt in (
        lambda: tuned.find(tmp_path, CONDITIONS),
        lambda: tuned.save(tmp_path, CONDITIONS, TREE, 1, 1),
        lambda: tuned.forget(tmp_path, "full"),
    ):
        with pytest.raises(CoralError, match=r"trees\.json cannot be read .* delete it"):
            attempt()


@pytest.fixture
def pair(models: Path, tmp_path: Path) -> tuple[Path, Target]:
    """A drafter of its own, with a tree tuned for the head `in_context` and the tiny target."""
    shutil.copytree(models / "drafter", tmp_path / "drafter")
    target = Target.load(models / "target")
    tuned.save(tmp_path / "drafter", tuned.Conditions.of(target, "in_context"), TREE, 1.5, 1.4)
    return tmp_path / "drafter", target


def test_generate_uses_the_tuned_tree(coral, models: Path, pair: tuple[Path, Target]) -> None:
    """Stops a tuned tree that is written and never used, and one that overrules --tree."""
    drafter, target = pair
    for name in (drafter, f"{drafter}+in_context", f"{drafter}+ngram"):
        loaded, lookup = library.load(target, name), str(name).endswith("+ngram")
        tree_size = replace(TREE, num_nodes=LOOKUP_NODES) if lookup else TREE
        assert (loaded.tree_size, loaded.tree_size_origin) == (tree_size, "tuned")
        cycles = list(loaded.stream("the the the", max_new_tokens=12))
        assert max(cycle.num_drafted for cycle in cycles) == tree_size.num_nodes
    for name in (None, "ngram", models / "drafter"):
        loaded = library.load(target, name)
        tree_size = replace(CPU_DEFAULT, num_nodes=LOOKUP_NODES) if name == "ngram" else CPU_DEFAULT
        assert (loaded.tree_size, loaded.tree_size_origin) == (tree_size, "default")
    command = (
        "generate",
        "--target",
        models / "target",
        "--drafter",
        drafter,
        "--max-new-tokens",
        6,
        "--stats",
    )
    assert coral(*command, "hi").err.endswith("tree 2,3,5,0 (tuned)\n")
    assert coral(*command, "--tree", "1,2,2", "hi").err.endswith("tree 1,2,2,0 (asked for)\n")
    (drafter / "coral" / "trees.json").write_text("{")
    broken = coral(*command, "hi")
    assert broken.code == 2 and "delete it" in broken.err
    assert coral(*command, "--tree", "1,2,2", "hi").code == 0


def test_bench_gives_each_drafter_its_tree(models: Path, pair: tuple[Path, Target], tmp_path: Path) -> None:
    """Stops one tree for all drafters, a table that hides it, and a bench that goes on with another one."""
    drafter, target = pair
    suite = tmp_path / "mine.jsonl"
    suite.write_text("".join(json.dumps({"id": i, "turns": [f"ask {i}"]}) + "\n" for i in range(2)))
    drafters = {"mine": drafter, "untuned": models / "drafter"}
    options = {"max_new_tokens": 8, "peers": False}
    results = bench(target, drafters, str(suite), tmp_path / "out", BenchConfig(**options))

    def read() -> dict:
        return json.loads(results.read_text())

    trees = read()["trees"]["float32"]
    assert TreeSize(**trees["mine"]["tree_size"]) == TREE and trees["mine"]["origin"] == "tuned"
    assert (
        TreeSize(**trees["untuned"]["tree_size"]) == CPU_DEFAULT and trees["untuned"]["origin"] == "default"
    )
    lines = [json.loads(line) for line in results.with_name("records.jsonl").read_text().splitlines()]
    most: dict[str, int] = {}
    for record_ in (line["record"] for line in lines if "record" in line):
        drafted = max(cycle["num_drafted"] for cycle in record_["cycles"])
        most[record_["method"]] = max(drafted, most.get(record_["method"], 0))
    unsure = 0  # an untrained drafter promises so little that none of its nodes is verified
    assert (most["mine"], most["untuned"]) == (TREE.num_nodes, unsure)
    from coral.bench.compare import compare, line
    from coral.bench.log import read as read_log
    from coral.bench.report import markdown

    assert "mine 2,3,5,0 (tuned), untuned 2,6,7,0.1 (default)" in markdown(read())
    found = compare(["mine"], ["untuned"], [read_log(tmp_path / "out")])
    assert "their trees differ" in line(found[0], "mine", "untuned")
    same = compare(["mine"], ["mine"], [read_log(tmp_path / "out")])
    assert "trees differ" not in line(same[0], "mine", "mine")
    (drafter / "coral" / "trees.json").unlink()
    bench(target, drafters, str(suite), tmp_path / "out", BenchConfig(**options))
    assert read()["trees"]["float32"] == trees
    config = BenchConfig(tree_size=TreeSize(1, 2, 2), **options)
    asked = bench(target, drafters, str(suite), tmp_path / "asked", config)
    assert {t["origin"] for t in json.loads(asked.read_text())["trees"]["float32"].values()} == {"asked for"}


def test_each_drafter_is_padded_to_its_own_tree(traced: None) -> None:
    """Stops a small tree that pays for the largest one of a compiled bench."""
    target = tiny.tiny_target()
    assert target.sized(5) is target
    compiled = target.on("graphs", (1, 2, 6, 16))
    small = compiled.sized(6)
    state = tiny.new_state(target, tiny.prompt_of(5))
    state.prefill(target, (-1,))
    assert [small._forward._size([state.cache], [n]) for n in (1, 2, 6, 7)] == [1, 6, 6, None]
    assert compiled.sizes == (1, 2, 6, 16)


def test_a_new_drafter_or_head_drops_what_was_tuned(
    coral, models: Path, pair: tuple[Path, Target], tmp_path
) -> None:
    """Stops a tree that was tuned to weights which are gone."""
    drafter, target = pair
    static = tuned.Conditions.of(target, "static")
    tuned.save(drafter, static, TREE, 1.5, 1.4)
    source = conversations(tmp_path / "c.jsonl")
    prepare([source], target.tokenizer, tmp_path / "data", PrepareConfig(held_out=1))
    made = coral("train-head", drafter, "--data", tmp_path / "data", "--target", models / "target",
                 "--kind", "static", "--size", 12)  # fmt: skip
    assert made.code == 0 and tuned.find(drafter, static) is None
    assert tuned.find(drafter, tuned.Conditions.of(target, "in_context")) == TREE
    assert heads.resolve(drafter, "auto") == "static"
    loaded = checkpoint.load(drafter, target)
    checkpoint.save(loaded, drafter, target=TargetRecord.of(target))
    assert not (drafter / "coral" / "trees.json").exists()


def test_training_drops_what_was_tuned(coral, models: Path, tmp_path: Path) -> None:
    """Stops a tree of an earlier update's drafter."""
    target = Target.load(models / "target")
    prepare(
        [conversations(tmp_path / "c.jsonl")], target.tokenizer, tmp_path / "data", PrepareConfig(held_out=1)
    )
    command = ("train", "--data", tmp_path / "data", "--target", models / "target")
    command += ("--output", tmp_path / "d", "--set", "batch_size=2")
    assert coral(*command, "--updates", 1).code == 0
    path = tuned.save(tmp_path / "d", CONDITIONS, TREE, 1.5, 1.4)
    assert coral(*command, "--updates", 2).code == 0 and not path.exists()


# -------------------------------------------------------------------------------------------------- CLI


def test_tune_then_generate(coral, models: Path, tmp_path: Path) -> None:
    """Stops a command that measures and forgets, and a tree that generate does not find again."""
    drafter = tmp_path / "drafter"
    shutil.copytree(models / "drafter", drafter)
    command = ("tune", drafter, "--target", models / "target", "--prompts", 2, "--max-new-tokens", 10)
    shown = coral(*command, "--no-write")
    assert shown.code == 0 and not (drafter / "coral" / "trees.json").exists()
    assert "2,6,7,0.1 (built in)" in shown.out
    assert re.search(r"predicted [\d.]+x, achieved [\d.]+x, deviation [+-]\d+%", shown.out)
    result = coral(*command, "--temperature", 1, "--deepen", 3)
    assert result.code == 0, result.err
    path = drafter / "coral" / "trees.json"
    (entry,) = json.loads(path.read_text())["trees"]
    assert (entry["conditions"]["head"], entry["conditions"]["layers"]) == ("in_context", 3)
    assert entry["predicted_speedup"] > 0 < entry["achieved_speedup"]
    tree = str(TreeSize(**entry["tree_size"]))
    assert f"tree {tree}: {path}" in result.out
    deepened = Target.load(models / "target")
    append_layers(deepened, 3)
    assert str(library.load(deepened, drafter).tree_size) == tree


def test_tune_on_held_out_prompts_and_what_it_refuses(coral, models: Path, tmp_path: Path) -> None:
    drafter = tmp_path / "drafter"
    shutil.copytree(models / "drafter", drafter)
    target = Target.load(models / "target")
    for held_out in (0, 2):
        prepare(
            [conversations(tmp_path / "c.jsonl")],
            target.tokenizer,
            tmp_path / f"data{held_out}",
            PrepareConfig(held_out=held_out),
        )
    command = ("tune", drafter, "--target", models / "target", "--max-new-tokens", 6)
    assert coral(*command, "--data", tmp_path / "data2").code == 0
    refused = {
        "no held-out prompts": coral(*command, "--data", tmp_path / "data0"),
        "leaves room for 600": coral(*command, "--max-new-tokens", 600),
        "no trained drafter": coral("tune", "ngram", "--target", models / "target"),
        "which drafter of this target": coral("tune", "--target", models / "target"),
        "no routed head": coral(*command, "--head", "routed"),
        "temperature is -1": coral(*command, "--temperature", -1),
        "no drafter directory": coral("tune", tmp_path / "nothing", "--target", models / "target"),
    }
    for said, result in refused.items():
        assert result.code == 2 and said in result.err, (said, result.err)
