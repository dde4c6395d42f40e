"""How the processes of a run share it: each holds the whole model (DDP), or a part of what is frozen (FSDP2).

What is trained is small beside the frozen weights, and whole on every process in either case: its checkpoints
and adapters are those of one process, and any number of processes can go on from them. Its gradients are
averaged by DDP, or, as FSDP2 leaves alone what it does not shard, by `average_gradients`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from rellax.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

Value = TypeVar("Value")


def start(device: torch.device) -> Accelerator:
    """Join the processes that `torchrun` or `accelerate launch` started; one alone without either."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    # The buffers, an item table among them, are the same on all processes and stay so.
    handlers: Any = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=handlers)


def leave() -> None:
    """Part from the processes that `start` joined, as torch asks of a program that ends."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_sharded(accelerator: Accelerator, fsdp: bool) -> bool:
    """Whether frozen weights are sharded: `fsdp`, or `accelerate launch --use_fsdp` asks for it.

    Raises:
        InputError: accelerate is configured for the first version of FSDP.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
            raise InputError(f"fsdp_version: expected 2 in accelerate's configuration, got {version}")
        fsdp = True
    return fsdp and accelerator.num_processes > 1


def shard(model: Any, device: torch.device) -> Any:
    """Shard the frozen weights of a patched model over all processes, layer by layer, in place.

    Args:
        model: on the CPU; only its own share, and the adapter, go to `device`.

    Raises:
        InputError: it has weights that are no floating-point numbers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    adapter = set(model.rellax.parameters())
    for projection in model.rellax.projections.values():
        adapter |= {projection.lora_a, projection.lora_b}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise InputError(
                f"fsdp: expected floating-point weights to shard, got {name} of {parameter.dtype}; "
                "leave it out for a quantised model: each process then holds all of it"
            )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*model.base_model.layers, model):
        fully_shard(part, mesh=mesh, ignored_params=adapter)
    for parameter in adapter:
        parameter.data = parameter.data.to(device)
    return model


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace the gradients by their means over all processes, in one exchange."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = _flatten_dense_tensors(gradients)
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(mean)


def from_main(accelerator: Accelerator, compute: Callable[[], Value]) -> Value:
    """What `compute` returns on the main process, or the InputError it raises there, on every process."""
    from accelerate.utils import broadcast_object_list

    result: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            result[0] = compute()
        except InputError as error:
            result[1] = str(error)
    value, problem = broadcast_object_list(result)
    if problem is not None:
        raise InputError(problem)
    return value
