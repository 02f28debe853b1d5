"""Compiled forwards of fixed shapes against the eager ones, their slow twins."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from tiny import HEADS, Bushes, Recorder, prompt_of, random_drafter, tiny_target, write
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.drafters.feature.propose import Feature
from coral.errors import CoralError
from coral.native import build as cpp
from coral.target.target import Target
from coral.tree import TreeSize

TREE_SIZE = TreeSize(top_k=3, max_depth=3, num_nodes=6)


@pytest.fixture
def own_cache() -> Iterator[None]:
    """The place of what is built is looked up once a process; here it changes."""
    cpp.use_own_cache.cache_clear()
    yield
    cpp.use_own_cache.cache_clear()


@pytest.mark.parametrize("kind", ["llama", "qwen2-sliding", "mistral-sliding"])
def test_padded_forwards_write_the_same(kind, monkeypatch):
    """Stops: padding rows that are attended to, by the target or the drafter, a window lost in the padded
    mask, a cache that is left with other rows than an eager forward leaves, and compiling for every length.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced, in seconds
    target = tiny_target(kind)
    fast = target.on("graphs", (1, TREE_SIZE.num_nodes + 1))
    proposer = Feature(random_drafter(target).drafter, fast)
    bushes = Bushes([], target.vocab_size)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for length, sampling in ((5, Sampling()), (9, Sampling(1.0, seed=3)), (14, Sampling())):
        bushes.texts = expected = write(target, Plain(), [prompt_of(length)], 24, sampling).texts
        for drafting in (Plain(), proposer, bushes):
            assert write(fast, drafting, [prompt_of(length)], 24, sampling, TREE_SIZE).texts == expected
        eager, padded = Recorder(random_drafter(target)), Recorder(proposer)
        for one, drafting in ((target, eager), (fast, padded)):
            write(one, drafting, [prompt_of(length)], 24, sampling, TREE_SIZE)
        assert padded.trees == eager.trees
    # Two sizes of the target and one of the drafter, whatever the length.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 3


@pytest.mark.parametrize("head", HEADS)
def test_every_head_drafts_the_same_compiled(head, monkeypatch):
    """Stops a head in a compiled draft step that meets padding, keeps the number of ids it was traced with
    (T > 0 wants more), or is compiled though it reads the text.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    target = tiny_target()
    fast = target.on("graphs", (1, TREE_SIZE.num_nodes + 1))
    drafter = random_drafter(target).drafter
    eager, padded = (Recorder(Feature(drafter, t, HEADS[head](t))) for t in (target, fast))
    for sampling in (Sampling(), Sampling(1.0, seed=3)):
        for one, drafting in ((target, eager), (fast, padded)):
            write(one, drafting, [prompt_of(9)], 24, sampling, TREE_SIZE)
    assert padded.trees == eager.trees


def test_each_target_has_its_own_graphs(monkeypatch):
    """Stops a compiled forward that runs another model's graph, since guards on modules are dropped."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for seed in (0, 1):
        torch.manual_seed(seed)
        target = Target(type(tiny_target().model)(tiny_target().model.config))
        expected = write(target, Plain(), [prompt_of(6)], 8).texts
        assert write(target.on("graphs", (1,)), Plain(), [prompt_of(6)], 8).texts == expected


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_frozen_weights_write_the_same():
    """Stops: the compiler's own packing of weights changing what is written."""
    target = tiny_target()
    expected = write(target, Plain(), [prompt_of(9)], 24).texts
    bushes = Bushes(expected, target.vocab_size)
    assert write(target.on("graphs", (7,)), bushes, [prompt_of(9)], 24, tree_size=TREE_SIZE).texts == expected


def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    """Stops: a page of traceback from inside the compiler at the first token."""
    monkeypatch.setattr("coral.native.build.shutil.which", lambda name: None)
    with pytest.raises(CoralError, match="install g\\+\\+, or use another backend"):
        tiny_target().on("graphs", (1,))


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_a_source_is_built_once_for_all_processes(own_cache, monkeypatch, tmp_path, capsys):
    """Stops two seconds of looking for vector units at the start of each command."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }')
    assert cpp.build(source).one() == 1
    assert "Building one.cpp" in capsys.readouterr().err
    cpp.build.cache_clear()
    monkeypatch.setattr(cpp, "_build", None)
    assert cpp.build(source).one() == 1


def test_decoding_does_without_what_the_compiler_refuses(monkeypatch, tmp_path, capsys):
    """Stops a broken compiler from breaking commands that never asked to compile."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    source = tmp_path / "broken.cpp"
    source.write_text("no C++")
    assert cpp.build(source) is None
    if shutil.which("g++"):
        assert "broken.cpp cannot be built" in capsys.readouterr().err


def test_kernels_outlive_the_machine(own_cache, monkeypatch, tmp_path):
    """Stops kernels in the directory for temporary files, which torch names in the environment by itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for named in (None, default_cache_dir()):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        if named:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", named)
        cpp.use_own_cache.cache_clear()
        tiny_target().on("graphs", (1,))
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "coral" / "compiled")
    cpp.use_own_cache.cache_clear()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "chosen"))
    tiny_target().on("graphs", (1,))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "chosen")


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_the_next_process_finds_the_kernels(tmp_path):
    """Stops source that differs from process to process, and so is compiled by each."""
    code = (
        "import torch; from coral.gpu.compiled import compiled; layer = torch.nn.Linear(64, 64)\n"
        "with torch.inference_mode(): compiled(layer.forward, torch.device('cpu'), 1)(torch.ones(2, 64))"
    )
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
    }
    sources = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        sources.append(sorted(path.name for path in tmp_path.rglob("*.main.cpp")))
    assert sources[0] and sources[0] == sources[1]
