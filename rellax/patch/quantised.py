"""Linear layers whose weights bitsandbytes or torchao has quantised.

bitsandbytes has layers of its own, `Linear8bitLt` and `Linear4bit`; torchao puts a tensor subclass into an
ordinary `nn.Linear`. Neither package is imported here first: a model that needs one has done so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def describe(module: Any) -> str | None:
    """What a linear layer's weight is quantised to, as in "bitsandbytes nf4"; None: to nothing known here."""
    if type(module) is nn.Linear:
        return f"torchao {type(module.weight).__name__}" if _is_torchao(module.weight) else None
    if "bitsandbytes" in sys.modules:
        from bitsandbytes.nn import Linear4bit, Linear8bitLt

        if type(module) is Linear8bitLt:
            return "bitsandbytes int8"
        if type(module) is Linear4bit:
            weight: Any = module.weight
            return f"bitsandbytes {weight.quant_type}"
    return None


def product(forward: Callable[[Tensor], Tensor], weight: Tensor, x: Tensor) -> Tensor:
    """`forward(x)` of a linear layer with this quantised weight, differentiable in x.

    bitsandbytes sees to that itself, and its backward pass makes the weight anew. torchao's weights are made
    for inference: dynamic ones have no gradient, others keep a whole dequantised weight for it. Here x gets
    dy W, with W dequantised in the backward pass, for all of them.
    """
    return _Product.apply(x, weight, forward) if _is_torchao(weight) else forward(x)


class Frozen(nn.Linear):
    """A linear layer of torchao's that is not adapted, and yet has a gradient."""

    rellax_base = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return product(super().forward, self.weight, x)


def frozen(model: nn.Module) -> list[nn.Module]:
    """The layers of a patched model that are to be `Frozen`: torchao's that no adapted layer calls."""
    called = {id(module.base_layer) for module in model.modules() if hasattr(module, "base_layer")}
    linears = [module for module in model.modules() if type(module) is nn.Linear and id(module) not in called]
    return [module for module in linears if _is_torchao(module.weight)]


def block_problem(model: nn.Module) -> str:
    """What keeps a model from its forward pass; "": nothing.

    On a CPU bitsandbytes 0.50 dequantises 4 bits wrongly where a row of weights is not whole blocks.
    """
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        state, inputs = getattr(weight, "quant_state", None), getattr(module, "in_features", 0)
        if state is not None and weight.device.type == "cpu" and inputs % state.blocksize:
            return (
                f"bitsandbytes {weight.quant_type} on a CPU takes layers that read a multiple of "
                f"{state.blocksize} values, got {inputs} in {name}"
            )
    return ""


def numel(parameter: Tensor) -> int:
    """How many weights a parameter stands for, however they are packed."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else torch.Size(state.shape).numel()


class _Product(torch.autograd.Function):
    """A frozen product whose backward pass dequantises the weight; nothing is kept in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, forward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return forward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return (dy @ ctx.weight.dequantize().to(dy.dtype)).to(ctx.dtype), None, None


def _is_torchao(weight: Tensor) -> bool:
    return type(weight).__module__.partition(".")[0] == "torchao"
