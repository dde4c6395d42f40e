"""``rellax::cflora_linear``: frozen linear layers of one input, with low-rank updates gated per instance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rellax.kernels._tiles import most_tiles, tile_table, tile_tokens
from rellax.ops import _cflora_cpp as cpp
from rellax.ops._check import (
    bad,
    can_read,
    check_cu_seqlens,
    check_number,
    check_offsets,
    check_tensor,
    is_floating,
    is_number,
)
from rellax.ops._register import operator
from rellax.reference import cflora as reference

_CPP_DTYPES = (torch.float32, torch.bfloat16)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check_values(x: Tensor, *rest: Any) -> None:
    *_, cu_seqlens, _tiles, _dropout, _seed = rest
    if cu_seqlens is not None:
        check_offsets(cu_seqlens, x.shape[0])


_forward = operator(
    "cflora_linear",
    reference.cflora_fwd,
    cpp=cpp.cflora_fwd,
    cpp_dtypes=_CPP_DTYPES,
    triton="rellax.kernels.cflora:cflora_fwd",
    triton_dtypes=_TRITON_DTYPES,
    check=_check_values,
)
_backward = operator(
    "cflora_linear_backward",
    reference.cflora_bwd,
    cpp=cpp.cflora_bwd,
    cpp_dtypes=_CPP_DTYPES,
    triton="rellax.kernels.cflora:cflora_bwd",
    triton_dtypes=_TRITON_DTYPES,
)


def cflora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor | None,
    scale: float,
    *,
    cu_seqlens: Tensor | None = None,
    tiles: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + scale · (drop(x) Aᵀ G_b) Bᵀ, with an r x r matrix G_b per instance (ReLLaX's CFLoRA).

    Gradients: x and gate always, lora_a and lora_b where they require them; weight and bias are frozen. With
    A and B frozen nothing of size T x d_in is kept for the backward pass. Under autocast x, weight and bias
    are cast as ``torch.nn.functional.linear`` would.

    Args:
        x: (B, L, d_in), or packed (T, d_in) with `cu_seqlens`; fp32, fp64, bf16 or fp16.
        weight: (d_out, d_in) in x's dtype.
        bias: (d_out,) in x's dtype, or None.
        lora_a: (r, d_in), the down components; any floating dtype.
        lora_b: (d_out, r), the up components; any floating dtype.
        gate: (B, r, r), on the right of a row vector; None is the identity: plain LoRA.
        scale: alpha / r.
        cu_seqlens: (B + 1,) int32, the offsets of the instances in a packed x.
        tiles: `cflora_tiles` of `cu_seqlens`, where several calls share them; made per call where not given.
        dropout: probability of dropping an element of x on its way into A, in [0, 1).
        seed: () int64 on x's device; drawn from torch's generator where it is needed and not given.

    Returns:
        (B, L, d_out) or (T, d_out), in x's dtype.

    Raises:
        InputError: a shape, dtype or device does not fit, or a frozen tensor requires a gradient. On a CPU
            also: cu_seqlens do not rise from 0 to T.
    """
    (y,) = cflora_linears(
        x,
        [weight],
        [bias],
        [lora_a],
        [lora_b],
        None if gate is None else [gate],
        scale,
        cu_seqlens=cu_seqlens,
        tiles=tiles,
        dropout=dropout,
        seed=seed,
    )
    return y


def cflora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    loras_a: Sequence[Tensor],
    loras_b: Sequence[Tensor],
    gates: Sequence[Tensor] | None,
    scale: float,
    *,
    cu_seqlens: Tensor | None = None,
    tiles: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`cflora_linear` of n layers that read the same x, as the q, k and v of an attention block do.

    x is read once for all low-rank updates, and its gradient is accumulated once. One dropout mask serves all
    layers.

    Args:
        weights, biases, loras_a, loras_b, gates: n each, as in `cflora_linear`, of one rank. No gates are
            identities.

    Returns:
        The n outputs, in x's dtype.

    Raises:
        InputError: as in `cflora_linear`, or the lists differ in length.
    """
    _check_lists({"weights": weights, "biases": biases, "loras_a": loras_a, "loras_b": loras_b}, gates)
    _check_tokens(x, cu_seqlens)
    if _is_autocast(x) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weights = x.to(dtype), [_cast(weight, dtype) for weight in weights]
        biases = [_cast(bias, dtype) for bias in biases]
    _check(x, loras_a, loras_b, gates, scale, cu_seqlens, tiles, dropout, seed)
    for weight, bias, lora_b in zip(weights, biases, loras_b, strict=True):
        _check_weight(x, weight, bias, lora_b)
    return _run(x, weights, biases, [], loras_a, loras_b, gates, scale, cu_seqlens, tiles, dropout, seed)


def cflora_update(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor | None,
    scale: float,
    *,
    cu_seqlens: Tensor | None = None,
    tiles: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """base + scale · (drop(x) Aᵀ G_b) Bᵀ: CFLoRA on a layer whose weights are out of reach, as if quantised.

    The arguments are those of `cflora_linear`; under autocast x is cast to base's dtype.

    Args:
        base: (B, L, d_out) or (T, d_out), the layer's own output for x.

    Returns:
        A new tensor like base. Its gradient goes to base as it is, and to x through the update.

    Raises:
        InputError: as in `cflora_linear`.
    """
    _check_tokens(x, cu_seqlens)
    if _is_autocast(x) and is_floating(base):
        x = x.to(base.dtype)
    gates = None if gate is None else [gate]
    _check(x, [lora_a], [lora_b], gates, scale, cu_seqlens, tiles, dropout, seed)
    check_tensor("base", base, (*x.shape[:-1], lora_b.shape[0]), "(…, d_out)", x.device, x.dtype)
    (y,) = _run(x, [], [], [base], [lora_a], [lora_b], gates, scale, cu_seqlens, tiles, dropout, seed)
    return y


def cflora_tiles(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The blocks of tokens that kernels work on, as an int32 tensor for the `tiles` of the other functions.

    It depends on the batch alone, so it is made once for all layers, on the device of `cu_seqlens`, without
    waiting for it.

    Args:
        cu_seqlens: (B + 1,) int32, the offsets of the instances in a packed batch.
        tokens: T, their sum.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise bad("cu_seqlens", "(B + 1,), int32", cu_seqlens)
    check_cu_seqlens(cu_seqlens, None, cu_seqlens.device)
    if can_read(cu_seqlens):
        check_offsets(cu_seqlens, tokens)
    return tile_table(cu_seqlens, tokens)


def _run(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *rest, gates, scale, cu_seqlens, tiles, dropout, seed = arguments
    if dropout and seed is None:
        seed = torch.randint(2**62, (), dtype=torch.int64, device=x.device)
    lists = [list(tensors) for tensors in rest]
    outputs, _ = _forward(x, *lists, list(gates or ()), scale, cu_seqlens, tiles, dropout, seed)
    return tuple(outputs)


@_forward.register_fake
def _forward_fake(
    x: Tensor,
    _weight: Sequence[Tensor],
    _bias: Sequence[Tensor | None],
    _base: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    *_: Any,
) -> tuple[list[Tensor], Tensor]:
    components = sum(a.shape[0] for a in lora_a)
    h = x.new_empty((x.shape[:-1].numel(), components), dtype=torch.promote_types(x.dtype, torch.float32))
    return [x.new_empty((*x.shape[:-1], b.shape[0])) for b in lora_b], h


@_backward.register_fake
def _backward_fake(
    dy: Sequence[Tensor],
    _x: Tensor | None,
    _weight: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    gate: Sequence[Tensor],
    *rest: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    need_x, need_gate, need_a, need_b = rest[-1]
    dx = dy[0].new_empty((*dy[0].shape[:-1], lora_a[0].shape[1]) if need_x else (0,))
    dgate, da, db = (
        [tensor.new_empty(tensor.shape) for tensor in tensors] if needed else []
        for tensors, needed in ((gate, need_gate), (lora_a, need_a), (lora_b, need_b))
    )
    return dx, dgate, da, db


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    x, weight, bias, base, lora_a, lora_b, gate, ctx.scale, cu_seqlens, tiles, ctx.dropout, seed = inputs
    _, h = output
    kept_x = x if any(a.requires_grad for a in lora_a) else None
    ctx.set_materialize_grads(False)
    ctx.lengths = [len(tensors) for tensors in (weight, lora_a, lora_b, gate)]
    ctx.outputs = [(y.shape, y.dtype) for y in output[0]]
    ctx.bases = len(base)
    # torch.library takes a list in which a tensor is missing for one opaque argument
    ctx.dbias = None if any(b is None for b in bias) else [None] * len(bias)
    ctx.save_for_backward(kept_x, h, cu_seqlens, tiles, seed, *weight, *lora_a, *lora_b, *gate)


def _autograd(ctx: Any, dys: list[Tensor | None], _dh: Tensor | None) -> tuple[Any, ...]:
    x, h, cu_seqlens, tiles, seed, *rest = ctx.saved_tensors
    weight, lora_a, lora_b, gate = ([rest.pop(0) for _ in range(length)] for length in ctx.lengths)
    need_x, _, _, _, *wanted, _, _, _, _, _ = ctx.needs_input_grad
    need_a, need_b, need_gate = map(any, wanted)
    needs = [need_x, need_gate, need_a, need_b]
    dy = [
        h.new_zeros(shape, dtype=dtype) if given is None else given
        for given, (shape, dtype) in zip(dys, ctx.outputs, strict=True)
    ]
    dx, dgate, da, db = _backward(
        dy, x, weight, lora_a, lora_b, gate, h, ctx.scale, cu_seqlens, tiles, ctx.dropout, seed, needs
    )
    gradients = (
        [g if needed else None for g, needed in zip(found or [None] * len(flags), flags, strict=True)]
        for found, flags in zip((da, db, dgate), wanted, strict=True)
    )
    dbase = dy if ctx.bases else []
    return dx if need_x else None, [None] * len(weight), ctx.dbias, dbase, *gradients, *[None] * 5


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _check_lists(lists: dict[str, Sequence[Any]], gates: Sequence[Tensor] | None) -> None:
    for name, tensors in (lists if gates is None else lists | {"gates": gates}).items():
        if not isinstance(tensors, (list, tuple)):
            raise bad(name, "a list of tensors, one for each layer", type(tensors).__name__)
        count = len(lists["weights"])
        if len(tensors) != count or not count:
            raise bad(name, f"one for each of the {max(count, 1)} layers", f"{len(tensors)}")


def _is_autocast(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _cast(tensor: Any, dtype: torch.dtype) -> Any:
    """As autocast does; what is no such tensor is found by the checks."""
    return tensor.to(dtype) if is_floating(tensor) else tensor


def _check_tokens(x: Tensor, cu_seqlens: Tensor | None) -> None:
    if not is_floating(x) or x.dim() != (3 if cu_seqlens is None else 2):
        raise bad("x", "floating (B, L, d_in), or packed (T, d_in) with cu_seqlens", x)


def _check(
    x: Tensor,
    loras_a: Sequence[Tensor],
    loras_b: Sequence[Tensor],
    gates: Sequence[Tensor] | None,
    scale: float,
    cu_seqlens: Tensor | None,
    tiles: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> None:
    device, d_in = x.device, x.shape[-1]
    check_tensor("lora_a", loras_a[0], (None, d_in), "(r, d_in)", device)
    r = loras_a[0].shape[0]
    instances = x.shape[0] if cu_seqlens is None else None
    for i, (lora_a, lora_b) in enumerate(zip(loras_a, loras_b, strict=True)):
        check_tensor("lora_a", lora_a, (r if i else None, d_in), "(r, d_in)", device)
        check_tensor("lora_b", lora_b, (None, r), "(d_out, r)", device)
        if gates is not None:
            check_tensor("gate", gates[i], (instances, r, r), "(B, r, r)", device)
            instances = gates[i].shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, instances, device)
    if tiles is not None:
        if cu_seqlens is None:
            raise bad("tiles", "None without cu_seqlens", tiles)
        # As long as that of these offsets and tokens: kernels would not write the rows of a missing tile.
        tokens, offsets = x.shape[0], cu_seqlens.shape[0]
        most = most_tiles(tokens, offsets - 1, tile_tokens(tokens, offsets - 1))
        check_tensor("tiles", tiles, (offsets + most,), "cflora_tiles of cu_seqlens", device, torch.int32)
    check_number("scale", scale, "a finite number")
    if not is_number(dropout) or not 0.0 <= dropout < 1.0:
        raise bad("dropout", "a probability in [0, 1)", dropout)
    if seed is not None:
        check_tensor("seed", seed, (), "()", device, torch.int64)


def _check_weight(x: Tensor, weight: Tensor, bias: Tensor | None, lora_b: Tensor) -> None:
    check_tensor("weight", weight, (None, x.shape[-1]), "(d_out, d_in)", x.device, x.dtype)
    d_out = weight.shape[0]
    if bias is not None:
        check_tensor("bias", bias, (d_out,), "(d_out,)", x.device, x.dtype)
    check_tensor("lora_b", lora_b, (d_out, None), "(d_out, r)", x.device)
    if torch.is_grad_enabled():
        for name, frozen in (("weight", weight), ("bias", bias)):
            if frozen is not None and frozen.requires_grad:
                raise bad(name, "a frozen tensor (requires_grad False)", "one that requires a gradient")
