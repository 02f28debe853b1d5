"""Cycles of decoding on a device that is not there: what they would wait for, a line each.

Tensors are torch's fake ones, without numbers, on a backend of its own. To ask such a tensor for a number
fails, as does an operation on tensors of two devices, a list as an index and a tensor that is made there from
numbers of the host: on a GPU each of them waits. Copies that would wait are refused here. A program of its
own, since the backend stays registered with the process.
"""

import traceback
from typing import Any
from unittest.mock import patch

import torch
from tiny import CONFIGS, HEADS, prompt_of, tiny_target
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import AutoModelForCausalLM

from coral.decoding.cycle import generate
from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.decoding.state import State
from coral.drafters.feature.network import Drafter, DrafterConfig
from coral.drafters.feature.propose import Feature
from coral.target.grouped_sdpa import GROUPED_SDPA
from coral.target.target import Target
from coral.tree import DraftTree, TreeSize

TREE_SIZE = TreeSize(top_k=3, max_depth=3, num_nodes=6, min_gain=0.5)
GPU = "gpu"


class NoWaits(TorchDispatchMode):
    """Refuses copies between devices that wait for the queue."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = kwargs.get("device") or (args[0].device if function is torch.ops.aten.copy_.default else None)
        source = args[1] if function is torch.ops.aten.copy_.default else args[0] if args else None
        if (
            isinstance(source, Tensor)
            and there is not None
            and torch.device(there).type != source.device.type
        ):
            raise RuntimeError(f"a copy from {source.device.type} to {there} waits")
        return function(*args, **kwargs)


def put(module: nn.Module) -> nn.Module:
    """The same module with its weights on the GPU."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                there = torch.empty(weight.shape, dtype=weight.dtype, device=GPU)
                part._parameters[name] = nn.Parameter(there, False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU)
    return module


def move(head: Any, target: Target) -> Any:
    """The same head on the GPU, for this target."""
    for name, value in vars(head).items():
        if isinstance(value, Tensor):
            setattr(head, name, torch.empty(value.shape, dtype=value.dtype, device=GPU))
        elif isinstance(value, nn.Module):
            put(value)
        elif isinstance(value, Target):
            setattr(head, name, target)
    return head


def uploaded(numbers: Any, device: torch.device) -> Tensor:
    """`device.upload`, which does not wait."""
    given = numbers if isinstance(numbers, Tensor) else torch.empty(len(numbers), dtype=torch.int64)
    return torch.empty(given.shape, dtype=given.dtype, device=device)


def read(trees: list[DraftTree], samples: list[Tensor]) -> tuple[list[DraftTree], list[list[int]]]:
    """`tree.read`, the one wait of a cycle: chains, of which the target takes two nodes."""
    found = []
    with unset_fake_temporarily():
        for tree in trees:
            tokens, parents = torch.arange(1, len(tree) + 1), torch.arange(-1, len(tree) - 1)
            found.append(DraftTree(tokens, parents, torch.zeros(len(tree)), levels=len(tree) - 1))
    return found, [[2, 3, 9, *[9] * len(tree)][: len(tree)] for tree in trees]


def decode(target: Target, proposer: Any, count: int, sampling: Sampling) -> None:
    states = [
        State(prompt_of(9 + i), 90, target.new_cache(99), sampling=sampling, sequence_id=i)
        for i in range(count)
    ]
    cycles = generate(target, proposer, states, TREE_SIZE)
    next(cycles)  # the prompt is read: caches and windows are made
    with NoWaits():
        next(cycles)


class Curious(Plain):
    """Looks at a number of the target's states."""

    layers = (-1,)

    def propose(self, states: Any, tree_size: Any) -> list[DraftTree]:
        assert float(states[0].unread.features.sum()) != 0
        return super().propose(states, tree_size)


def check(name: str, *arguments: Any) -> None:
    try:
        decode(*arguments)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = next(frame for frame in reversed(frames) if "/coral/" in frame.filename)
        print(f"{name}: {where.filename}:{where.lineno}: {str(error).splitlines()[0]}")


def main() -> None:
    _setup_privateuseone_for_python_backend(GPU)
    heads = {name: make(tiny_target()) for name, make in HEADS.items()}
    with (
        FakeTensorMode(),
        patch("coral.cache.from_dlpack", lambda tensor: tensor),  # knows no device of this name
        patch("coral.decoding.cycle.read", read),
        patch("coral.target.forward.upload", uploaded),
        patch("coral.tree.upload", uploaded),
        patch("coral.drafters.recurrent.grower.upload", uploaded),
        patch("coral.drafters.heads.in_context.upload", uploaded),
    ):
        for kind in ("llama", "qwen2-sliding", "mistral-sliding", "phi3-sliding", "olmo2"):
            model = AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation=GROUPED_SDPA)
            target: Any = Target(put(model))  # type: ignore[arg-type]
            drafter: Any = put(Drafter(DrafterConfig.for_target(CONFIGS[kind])))
            full = Feature(drafter, target)
            for name, proposer in (("plain", Plain()), ("full", full)):
                check(f"{kind}, {name}", target, proposer, 1, Sampling())
            if kind == "llama":
                for name, made in heads.items():
                    check(name, target, Feature(drafter, target, move(made, target)), 1, Sampling())
                for sampling in (Sampling(1.0), Sampling(0.8, top_k=9, top_p=0.9)):
                    for count in (1, 3):
                        check(f"{sampling}, {count} texts", target, full, count, sampling)
        check("Curious", target, Curious(), 1, Sampling())


if __name__ == "__main__":
    main()
