"""``rellax._C``'s gate bank as implementations of ``rellax::gate_bank`` and its backward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rellax.ops._check import dtype_name
from rellax.ops._register import extension

_WIDENED = torch.float16  # its parameters go to the kernels in fp32


def gate_bank_fwd(
    u: Tensor, ln_weight: Tensor, ln_bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float
) -> Tensor:
    """As ``rellax.reference.gate_bank.gate_bank_fwd``, for fp32, bf16 and fp16."""
    arguments = [_ready(tensor) for tensor in (ln_weight, ln_bias, w1, b1, w2)]
    u, b2 = u.float().contiguous(), _ready(b2)
    r = math.isqrt(w1.shape[1] // 2)
    full = w2.shape[1] == r * r
    gate = u.new_empty((w1.shape[0], u.shape[0], *((r, r) if full else (r,))))
    extension().gate_bank_forward(
        _bank(eps, u, *arguments), b2=b2.data_ptr(), flat=gate.data_ptr(), threads=torch.get_num_threads()
    )
    return gate if full else torch.diag_embed(gate)


def gate_bank_bwd(
    dgate: Tensor,
    u: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    eps: float,
    need_u: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``rellax.reference.gate_bank.gate_bank_bwd``, for fp32, bf16 and fp16."""
    full = w2.shape[1] == dgate.shape[-1] ** 2
    dflat = (dgate.flatten(2) if full else dgate.diagonal(dim1=-2, dim2=-1)).contiguous()
    arguments = [_ready(tensor) for tensor in (ln_weight, ln_bias, w1, b1, w2)]
    rows = u.float().contiguous()
    du = rows.new_empty(rows.shape if need_u else (0,))
    gradients = [torch.empty_like(tensor) for tensor in arguments]
    gradients.append(arguments[-1].new_empty(w2.shape[:2]))
    names = ("dln_weight", "dln_bias", "dw1", "db1", "dw2", "db2")
    extension().gate_bank_backward(
        _bank(eps, rows, *arguments),
        dflat=dflat.data_ptr(),
        du=du.data_ptr() if need_u else 0,
        **{name: gradient.data_ptr() for name, gradient in zip(names, gradients, strict=True)},
        threads=torch.get_num_threads(),
    )
    dln_weight, dln_bias, dw1, db1, dw2, db2 = (gradient.to(w1.dtype) for gradient in gradients)
    return du.to(u.dtype), dln_weight, dln_bias, dw1, db1, dw2, db2


def _ready(parameter: Tensor) -> Tensor:
    """Contiguous, in a dtype that the kernels take."""
    return (parameter.float() if parameter.dtype == _WIDENED else parameter).contiguous()


def _bank(
    eps: float, u: Tensor, ln_weight: Tensor, ln_bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor
) -> Any:
    return extension().GateBank(
        dtype=dtype_name(w1.dtype),
        projections=w1.shape[0],
        instances=u.shape[0],
        d_u=u.shape[1],
        hidden=w1.shape[1],
        outputs=w2.shape[1],
        u=u.data_ptr(),
        eps=eps,
        ln_weight=ln_weight.data_ptr(),
        ln_bias=ln_bias.data_ptr(),
        w1=w1.data_ptr(),
        b1=b1.data_ptr(),
        w2=w2.data_ptr(),
    )
