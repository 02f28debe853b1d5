"""Several processes, on one machine or more: where each computes, and how much of the weights it holds.

`accelerate launch` starts them. Every process reads its own rows of each update; the drafter is whole in all
of them (DDP), or with `--use_fsdp` spread over them (FSDP2), and the frozen target may be spread likewise.
Torch's `fully_shard` spreads them. It is called here and not by accelerate, which supports it on GPUs only:
one path for every device can be tested on a CPU.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import patch_environment
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from coral.drafters import kinds
from coral.errors import CoralError

TIMEOUT = timedelta(hours=2)
"""How long processes wait for each other: the main one may measure and write while they do."""


class ShardableTarget(Protocol):
    """What sharding asks of a target."""

    @property
    def model(self) -> Any: ...
    @property
    def decoder(self) -> Any: ...


def join(device: str | None, device_map: str | None = None) -> str | None:
    """Meet the other processes of this run, where there are any. Call it before weights are read.

    Args:
        device, device_map: what the user asks for.

    Returns:
        The device of this process: `device` itself in a run of one process.

    Raises:
        CoralError: a device that cannot be that of every process, or a device map in several processes or
            beside a device.
    """
    # Otherwise transformers leaves the target's weights out of all processes but one.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if device is not None and device_map is not None:
        raise CoralError("--device and --device-map both say where the target goes; leave one of them out.")
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device_map is not None:
        raise CoralError(
            "--device-map gives one process all GPUs, so there can be no second one; leave accelerate launch "
            "out, or use --shard-target instead."
        )
    cpu = device == "cpu" or not torch.accelerator.is_available()
    own = PartialState(cpu=cpu, timeout=TIMEOUT).device
    if device not in (None, own.type):
        raise CoralError(
            f"--device {device} cannot be the device of every process; leave it out, and each gets its own."
        )
    return "cpu" if own.type == "cpu" else str(own)


def new_accelerator(device: torch.device, **options: Any) -> Accelerator:
    """The accelerator of a run whose target lies on `device`.

    Raises:
        CoralError: the target lies on a device that is not this process's, or the launcher asks for mixed
            precision or for an FSDP other than ours.
    """
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        raise CoralError(
            "precision is an option of the recipe; leave --mixed_precision out, and say --set "
            "precision=bfloat16."
        )
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # we do that
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no", **options)
    own = accelerator.device
    if accelerator.num_processes > 1 and (device.type != own.type or (device.index or 0) != (own.index or 0)):
        raise CoralError(f"the target lies on {device}, but this process computes on {own}; load it there.")
    return accelerator


def fsdp_asked() -> bool:
    """Whether `accelerate launch --use_fsdp` started this process.

    Raises:
        CoralError: it asks for the first version of FSDP, or for weights in the CPU's memory.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise CoralError("FSDP's first version is not supported; add --fsdp_version 2.")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise CoralError("the drafter is not offloaded to the CPU; leave --fsdp_offload_params out.")
    return True


def distribute(accelerator: Accelerator, learner: Any) -> Any:
    """The module that all processes train together. Make its optimiser after this.

    One FSDP unit is enough: a drafter is a few percent of its target, and what it costs is optimiser state.
    """
    if accelerator.num_processes > 1 and fsdp_asked():
        return fully_shard(learner, mesh=_mesh(accelerator.device))
    # On its device already, which need not be accelerate's where the target has several.
    return accelerator.prepare_model(learner, device_placement=False)


@contextmanager
def without_exchange(accelerator: Accelerator, learner: Any) -> Iterator[None]:
    """Backward passes in here keep their gradients; a later one exchanges them together with its own."""
    if not isinstance(learner, FSDPModule):
        with accelerator.no_sync(learner):
            yield
        return
    learner.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        learner.set_requires_gradient_sync(True)


def clip(parameters: list[nn.Parameter], most: float) -> float:
    """Scale gradients down to the norm `most`, over all processes; the norm that they had."""
    return whole(nn.utils.clip_grad_norm_(parameters, most)).item()


def whole(value: Any) -> Any:
    """A tensor that is spread over the processes, gathered in each; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_drafter(drafter: Any) -> Any:
    """The drafter, or where it is spread a copy that is not, in every process; all must call this."""
    if not _is_spread(drafter):
        return drafter
    tensors = {name: whole(tensor) for name, tensor in drafter.state_dict().items()}
    copy = kinds.find(drafter.kind).Drafter(drafter.config)
    copy.load_state_dict(tensors)
    return copy.to(next(iter(tensors.values())).device)


def whole_moments(optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state in the CPU's memory, the same for every way of distributing it; all processes
    must call this.
    """
    moments: dict[str, Any] = tree_map(
        lambda value: whole(value).cpu() if isinstance(value, Tensor) else value, optimiser.state_dict()
    )
    return moments


def load_moments(optimiser: torch.optim.Optimizer, moments: dict[str, Any]) -> None:
    """Give an optimiser what `whole_moments` returned; each process keeps its own part.

    Raises:
        ValueError: they are those of other parameters.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    shapes = [p.shape for p in parameters]
    names = ("momentum_buffer",) if isinstance(optimiser, torch.optim.Muon) else ("exp_avg", "exp_avg_sq")
    for index, values in moments["state"].items():
        own = shapes[index] if 0 <= index < len(shapes) else None
        if any(getattr(values.get(name), "shape", None) != own for name in names):
            raise ValueError(f"the moments of parameter {index} are not of its shape")
    parts = {
        index: {name: _part_as(parameters[index], value) for name, value in values.items()}
        for index, values in moments["state"].items()
    }
    optimiser.load_state_dict({**moments, "state": parts})


def _part_as(parameter: Tensor, value: Any) -> Any:
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def shard_target(target: ShardableTarget) -> None:
    """Spread the target's decoder over the processes, in place and for good; each layer is gathered while it
    runs. Embedding and LM head stay whole, since losses and inputs read them.

    A target that lies in the CPU's memory is moved to the processes' devices layer by layer, so that none
    ever holds it whole. Every process must then run it equally often.

    Raises:
        CoralError: a run of one process, or a target that is placed by a device map.
    """
    state = PartialState()
    if state.num_processes == 1:
        raise CoralError(
            "a target is sharded over several processes, and this is only one; start them with accelerate "
            "launch, or use --device-map auto."
        )
    if hasattr(target.model, "hf_device_map"):
        raise CoralError("a target that a device map places cannot be sharded; leave one of the two out.")
    mesh, kept = _mesh(state.device), set()
    for module in (target.model.get_input_embeddings(), target.model.get_output_embeddings()):
        module.to(state.device)
        kept |= set(module.parameters())
    for layer in target.decoder.layers:
        fully_shard(layer, mesh=mesh, ignored_params=kept)
    fully_shard(target.decoder, mesh=mesh, ignored_params=kept)


def is_sharded(target: Any) -> bool:
    """Whether `shard_target` was called on it."""
    return isinstance(getattr(target, "decoder", None), FSDPModule)


def _is_spread(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def _mesh(device: torch.device) -> DeviceMesh:
    return init_device_mesh(device.type, (PartialState().num_processes,))
