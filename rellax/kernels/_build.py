"""What each kernel can be compiled to without a GPU: the source of the table that `make kernels` writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rellax.kernels import _tuning


@dataclass(frozen=True)
class Build:
    """One specialisation of a Triton kernel, as a launcher would ask for it.

    Every kernel module has a function ``builds()`` that yields one for each kernel, dtype and tile shape that
    its launcher can choose, a kernel's heaviest last.

    Attributes:
        name: kernel, dtype and tile shape, for people.
        kernel: the function under ``@triton.jit``.
        signature: type of each argument that is no constant, in Triton's words: "*bf16", "i32", "fp32"; a
            tuple of types where the argument is a tuple.
        constants: value of each `tl.constexpr` argument, None for an absent pointer, and integers that are 1.
        aligned: the arguments that are multiples of 16 (addresses, strides), as they mostly are at run time.
        uses_dot: whether matrix instructions are expected in the result.
        backend: "cuda" or "hip"; "sm_90" or the like where that architecture has a configuration of its own.
        num_warps, num_stages: as in the launch.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str | tuple[str, ...]]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]
    uses_dot: bool
    backend: str
    num_warps: int = 4
    num_stages: int = 2


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def record(case: str, launch: Callable[[], object], backend: str) -> Iterator[Build]:
    """What `launch` asks for on GPUs of one maker, learnt by calling it on tensors of `meta`.

    Args:
        case: what the names of the builds say besides the kernel; a dtype's "torch." is left out.
        launch: launches kernels for such tensors.
        backend: "cuda", "hip", or an architecture, as "sm_90".
    """
    from triton.runtime.jit import JITFunction, mangle_type

    calls: list[tuple[Any, dict[str, Any]]] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        calls.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | keywords))

    version = "any" if backend == "hip" or backend.startswith("gfx") else None
    name = "" if backend in ("cuda", "hip") else backend
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(torch.version, "hip", version),
        mock.patch.object(_tuning, "architecture", return_value=name),
    ):
        launch()
    for kernel, arguments in calls:
        signature, constants, aligned = {}, {}, []
        for parameter in kernel.params:
            value = arguments.pop(parameter.name)
            specialised = not parameter.do_not_specialize and isinstance(value, int)
            if parameter.is_constexpr or value is None or (specialised and value == 1):
                constants[parameter.name] = value
                continue
            signature[parameter.name] = mangle_type(value)
            addresses = value if isinstance(value, tuple) else (value,)
            if (specialised and value % 16 == 0) or all(_aligned(address) for address in addresses):
                aligned.append(parameter.name)
        title = kernel.__name__.strip("_").removesuffix("_kernel")
        flags = [name.lower() for name, value in constants.items() if value is True]
        narrow = any("16" in str(kind) for kind in signature.values())
        yield Build(
            name=" ".join([title, case.replace("torch.", ""), *flags]),
            kernel=kernel,
            signature=signature,
            constants=constants,
            aligned=tuple(aligned),
            uses_dot="tl.dot(" in kernel.src and (narrow or backend == "hip"),
            backend=backend,
            **arguments,
        )


def _aligned(value: object) -> bool:
    """Whether it is a tensor at a multiple of 16 bytes."""
    return isinstance(value, Tensor) and value.data_ptr() % 16 == 0
