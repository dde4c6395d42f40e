"""What each kernel can be compiled to without a GPU: the source of the table that `make kernels` writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Build:
    """One specialisation of a Triton kernel, as a launcher would ask for it.

    Every kernel module has a function ``builds()`` that yields one for each kernel, dtype and tile shape that
    its launcher can choose.

    Attributes:
        name: kernel, dtype and tile shape, for people.
        kernel: the function under ``@triton.jit``.
        signature: type of each argument that is no constant, in Triton's words: "*bf16", "i32", "fp32".
        constants: value of each `tl.constexpr` argument, and None for an absent pointer.
        aligned: the arguments that are multiples of 16 (addresses, strides), as they mostly are at run time.
        num_warps, num_stages: as in the launch.
        uses_dot: whether matrix instructions are expected in the result.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    uses_dot: bool = False
