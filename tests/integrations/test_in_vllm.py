"""The plug-in for vLLM beside stand-ins for vLLM's own classes; checks/vllm_check.py runs it in vLLM."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_pair import save_drafter, save_target
from torch import nn

from coral.drafters import checkpoint
from coral.drafters.heads import store as heads
from coral.drafters.heads.low_rank import factorise
from coral.drafters.heads.routed import Router
from coral.errors import CoralError
from coral.export import write
from coral.integrations.vllm import ARCHITECTURE, register
from coral.target.target import Target


class Eagle(nn.Module):
    """What vLLM's EagleLlamaForCausalLM does that the plug-in relies on."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.speculative_config.draft_model_config.hf_config

    def forward(self, *given: Any) -> str:
        return "drafted"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    registered: dict[str, str] = {}
    registry = SimpleNamespace(register_model=registered.__setitem__)
    modules: dict[str, dict[str, Any]] = {
        "vllm": {"ModelRegistry": registry},
        "vllm.config": {"VllmConfig": object},
        "vllm.model_executor.models.llama_eagle": {"EagleLlamaForCausalLM": Eagle},
    }
    for name in ("vllm.model_executor", "vllm.model_executor.models"):
        modules[name] = {}
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    register()
    module_name, class_name = registered[ARCHITECTURE].split(":")
    yield getattr(importlib.import_module(module_name), class_name)
    sys.modules.pop(module_name)


@pytest.fixture
def target(tmp_path: Path) -> Target:
    save_target(tmp_path / "target")
    return Target.load(tmp_path / "target", dtype="float32")


@pytest.fixture
def drafter(tmp_path: Path, target: Target) -> Path:
    directory = tmp_path / "drafter"
    save_drafter(directory, tmp_path / "target")
    torch.manual_seed(0)
    v, h = target.head_weight.shape
    up, down = factorise(target.head_weight, torch.eye(h), 4)
    router = {f"router.{name}": tensor for name, tensor in Router(h, 4).state_dict().items()}
    groups = torch.full((3, -(-(v - 2) // 3)), -1)
    groups.view(-1)[: v - 2] = torch.randperm(v)[2:]  # the other two are the core
    heads.save(directory, "low_rank", {"up": up, "down": down}, rescored=5)
    heads.save(directory, "static", {"ids": torch.randperm(v)[:9]})
    heads.save(directory, "routed", {"ids": groups, **router}, active=1, core=2)
    return directory


def served(plugin: Any, directory: Path, target: Target) -> Any:
    """The drafter as vLLM would make it; its LM head is padded, as vLLM's is."""
    config = SimpleNamespace(**json.loads((directory / "config.json").read_text()))
    draft = SimpleNamespace(model=str(directory), revision=None, hf_config=config)
    made = plugin(vllm_config=SimpleNamespace(speculative_config=SimpleNamespace(draft_model_config=draft)))
    padding = torch.full((7, target.hidden_size), 99.0)
    made.lm_head = SimpleNamespace(weight=torch.cat([target.head_weight, padding]), bias=None, tp_size=1)
    assert made(None, None, None) == "drafted"
    return made


@pytest.mark.parametrize("kind", heads.KINDS)
def test_it_drafts_what_we_draft(
    kind: str, plugin: Any, drafter: Path, target: Target, tmp_path: Path
) -> None:
    """Stops: another head than the one exported, ids of the padding, ids left out that can be drafted."""
    exported = write.export(drafter, "vllm-coral", tmp_path / "out", served="T", head=kind)
    assert exported.head == kind and sorted(exported.left_out) == sorted({*heads.KINDS} - {kind})
    assert [*heads.made(tmp_path / "out")] == [kind]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [ARCHITECTURE]
    made = served(plugin, tmp_path / "out", target)
    features = torch.randn(6, target.hidden_size)
    for rows in (features, *features.split(1)):
        ids, scores = heads.load(drafter, target, kind).topk(rows, 3, [], torch.zeros(len(rows)))
        logits = made.compute_logits(rows)
        assert logits.shape == (len(rows), target.vocab_size)
        torch.testing.assert_close(logits.topk(3).values, scores)
        assert torch.equal(logits.topk(3).indices, ids)
        assert torch.equal(made.get_top_tokens(rows), ids[:, 0])
        assert bool(logits.isinf().any()) == (kind != "low_rank")


def test_what_cannot_be_served_is_refused(plugin: Any, drafter: Path, target: Target, tmp_path: Path) -> None:
    """Stops: a head made of a part of the target's rows, and an export without the head it is for."""
    write.export(drafter, "vllm-coral", tmp_path / "out", served="T")
    made = served(plugin, tmp_path / "out", target)
    made._head, made.lm_head.tp_size = None, 2
    with pytest.raises(CoralError, match="in one piece"):
        made(None, None, None)
    with pytest.raises(CoralError, match="no full one"):
        write.export(drafter, "vllm-coral", tmp_path / "other", served="T", head="full")
    assert not (tmp_path / "other").exists()
    plain = write.export(drafter, "vllm", tmp_path / "plain", served="T")
    assert plain.head is None
    with pytest.raises(CoralError, match="holds no head to serve"):
        served(plugin, tmp_path / "plain", target)


def test_its_tensors_come_back(drafter: Path, target: Target, tmp_path: Path) -> None:
    """Stops: a directory in which vLLM's loader finds the head's tensors beside the drafter's."""
    from coral.export.read import read

    write.export(drafter, "vllm-coral", tmp_path / "out", served="T")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "coral",
    }
    before, after = checkpoint.load(drafter).state_dict(), read(tmp_path / "out", target).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.slow
def test_nothing_imports_vllm() -> None:
    """Stops an import of vLLM, which is not installed here, from any other part than the plug-in's model."""
    modules = "coral.integrations.vllm, coral.export.write, coral.cli.main"
    code = f"import sys, {modules}; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
