"""Argument errors of the operators, all in one form."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from rellax.errors import InputError

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MOST = 2**31  # of whatever there can be so many of


def bad(name: str, expected: str, got: object) -> InputError:
    """The error for argument `name`; a tensor is shown by its shape, dtype and device."""
    if isinstance(got, Tensor):
        layout = "" if got.layout == torch.strided else f" {dtype_name(got.layout)}"
        got = f"{tuple(got.shape)}, {dtype_name(got.dtype)}{layout}, on {got.device}"
    elif isinstance(got, np.ndarray):
        got = f"an array of NumPy's, {got.shape}"
    return InputError(f"{name}: expected {expected}, got {got}")


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    meaning: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise unless `tensor` has `shape` and `dtype` and lies on `device`.

    Args:
        shape: None stands for any size.
        meaning: how the shape is written, e.g. "(r, d_in)".
        dtype: None stands for any floating dtype.
    """
    if (
        is_strided(tensor)
        and tensor.dim() == len(shape)
        and all(size in (None, actual) for size, actual in zip(shape, tensor.shape, strict=True))
        and (is_floating(tensor) if dtype is None else tensor.dtype == dtype)
        and tensor.device == device
    ):
        return
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    kind = "floating" if dtype is None else dtype_name(dtype)
    raise bad(name, f"{meaning} = ({sizes}), {kind}, on {device}", tensor)


def dtype_name(dtype: torch.dtype | torch.layout) -> str:
    """As error messages and the extension have it: "float32"."""
    return str(dtype).removeprefix("torch.")


def is_strided(value: object) -> bool:
    """Whether it is a tensor, and one whose elements lie in memory."""
    return isinstance(value, Tensor) and value.layout == torch.strided


def is_floating(value: object) -> bool:
    """Whether it is such a tensor of a floating dtype that can be computed with."""
    return isinstance(value, Tensor) and is_strided(value) and value.dtype in _FLOATING


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise unless `value` is a whole number from `least` to 2³¹ - 1."""
    if not _is_count(value, least):
        raise bad(name, f"a whole number, at least {least} and less than 2^31", repr(value))


def is_token(value: object) -> bool:
    """Whether it can be the id of a token."""
    return _is_count(value, 0)


def _is_count(value: Any, least: int) -> bool:
    whole = isinstance(value, (int, np.integer, torch.SymInt)) and not isinstance(value, bool)
    return whole and bool(least <= value < _MOST)


def check_number(
    name: str, value: float, expected: str, low: float = -math.inf, below: float = math.inf
) -> None:
    """Raise unless `value` is a finite number in [low, below); `expected` says so."""
    plain = value.item() if isinstance(value, np.generic) else value  # NumPy's would round the bounds
    if not is_number(plain) or not low <= plain < below:
        raise bad(name, expected, repr(value))


def check_positive(name: str, value: float) -> None:
    """Raise unless `value` is a finite number above 0."""
    check_number(name, value, "a positive number", sys.float_info.min)


def is_number(value: Any) -> bool:
    """Whether it is a finite number of Python's or NumPy's that a float can hold, and no bool."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= sys.float_info.max
    kinds = (float, np.integer, np.floating, torch.SymInt, torch.SymFloat)
    return isinstance(value, kinds) and bool(-math.inf < value < math.inf)


def can_read(tensor: Tensor) -> bool:
    """Whether values may be checked now: on a CPU, outside of tracing. No GPU is made to wait for a check."""
    traced = torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)
    return tensor.device.type == "cpu" and not traced


def check_cu_seqlens(cu_seqlens: Tensor, instances: int | None, device: torch.device) -> None:
    """Raise unless `cu_seqlens` is (B + 1,) int32."""
    offsets = None if instances is None else instances + 1
    check_tensor("cu_seqlens", cu_seqlens, (offsets,), "(B + 1,)", device, torch.int32)


def check_offsets(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise unless the values rise from 0 to `tokens`."""
    ends = cu_seqlens.tolist()
    if not ends or ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in itertools.pairwise(ends)):
        raise bad("cu_seqlens", f"offsets that rise from 0 to the {tokens} tokens", ends)


def check_embeddings(embeddings: Tensor) -> None:
    """Raise unless `embeddings` is (N, D) of a dtype that retrieval takes."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if not is_strided(embeddings) or embeddings.dim() != 2 or embeddings.dtype not in dtypes:
        raise bad("embeddings", "(N, D) float32, bfloat16 or float16", embeddings)


def check_index(name: str, index: Tensor, shape: str, device: torch.device) -> None:
    """Raise unless `index` is one-dimensional, int32 or int64, on `device`; `shape` is shown, e.g. "(Q,)"."""
    dtypes = (torch.int32, torch.int64)
    if not is_strided(index) or index.dim() != 1 or index.dtype not in dtypes or index.device != device:
        raise bad(name, f"{shape} int32 or int64 on {device}", index)


def check_range(name: str, index: Tensor, limit: int, meaning: str) -> None:
    """Raise unless all values of `index`, each a `meaning`, lie in [0, limit). Reads the values."""
    outside = index[(index < 0) | (index >= limit)]
    if outside.numel():
        raise bad(name, f"a {meaning}, in [0, {limit})", int(outside[0]))
