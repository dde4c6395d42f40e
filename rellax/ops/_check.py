"""Argument errors of the operators, all in one form."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from rellax.errors import InputError


def bad(name: str, expected: str, got: object) -> InputError:
    """The error for argument `name`; a tensor is shown by its shape, dtype and device."""
    if isinstance(got, Tensor):
        got = f"{tuple(got.shape)} {str(got.dtype).removeprefix('torch.')} on {got.device}"
    return InputError(f"{name}: expected {expected}, got {got}")


def check_shape(
    name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str, device: torch.device
) -> None:
    """Raise unless `tensor` has `shape` (written as `meaning`, e.g. "(r, d_in)") and lies on `device`."""
    if tuple(tensor.shape) != shape:
        raise bad(name, f"shape {meaning} = {shape}", tensor)
    if tensor.device != device:
        raise bad(name, f"a tensor on {device}", tensor)


def can_read(tensor: Tensor) -> bool:
    """Whether values may be checked now: on a CPU, outside of tracing. No GPU is made to wait for a check."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_cu_seqlens(cu_seqlens: Tensor, instances: int | None, tokens: int, device: torch.device) -> None:
    """Raise unless `cu_seqlens` (B + 1,) int32 rises from 0 to `tokens`; values are read on a CPU only."""
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.device != device:
        raise bad("cu_seqlens", f"shape (B + 1,) int32 on {device}", cu_seqlens)
    if instances is not None and cu_seqlens.shape[0] != instances + 1:
        raise bad("cu_seqlens", f"shape (B + 1,) = ({instances + 1},)", cu_seqlens)
    if can_read(cu_seqlens):
        ends = cu_seqlens.tolist()
        if not ends or ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in itertools.pairwise(ends)):
            raise bad("cu_seqlens", f"offsets that rise from 0 to the {tokens} tokens", ends)


def check_embeddings(embeddings: Tensor) -> None:
    """Raise unless `embeddings` is (N, D) of a dtype that retrieval takes."""
    if embeddings.dim() != 2 or embeddings.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise bad("embeddings", "(N, D) float32, bfloat16 or float16", embeddings)


def check_index(name: str, index: Tensor, shape: str, device: torch.device) -> None:
    """Raise unless `index` is one-dimensional, int32 or int64, on `device`; `shape` is shown, e.g. "(Q,)"."""
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64) or index.device != device:
        raise bad(name, f"{shape} int32 or int64 on {device}", index)


def check_range(name: str, index: Tensor, limit: int, meaning: str) -> None:
    """Raise unless all values of `index`, each a `meaning`, lie in [0, limit). Reads the values."""
    outside = index[(index < 0) | (index >= limit)]
    if outside.numel():
        raise bad(name, f"a {meaning}, in [0, {limit})", int(outside[0]))
