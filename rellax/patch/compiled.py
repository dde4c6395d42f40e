"""The frozen model's norms and MLPs, compiled: fewer passes over the activations, and fewer of them kept.

Attention and adapted layers stay as they are: their operators are kernels already, and packed attention looks
at the batch. So no graph breaks, and batches of all lengths share one piece of code.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from rellax.errors import InputError, one_line
from rellax.patch import quantised
from rellax.patch.engine import patched_model
from rellax.patch.forward import Projection

Model = TypeVar("Model", bound=nn.Module)


def compile_frozen(model: Model, *, backend: str = "inductor") -> Model:
    """Compile a patched model's norms, and its MLPs where nothing in them is adapted or quantised, in place.

    For the backward pass a norm in half precision keeps its input as it came, no longer in fp32, and an MLP
    keeps two tensors of its width instead of three. Rounding alone changes: between two products nothing is
    rounded to half precision. The first batch waits for the compiler, on a CPU half a minute. `unpatch_model`
    undoes it.

    Args:
        model: a patched model, which is returned.
        backend: of `torch.compile`.

    Raises:
        InputError: the model is not patched, or this machine has no C++ compiler that a CPU's code needs.
    """
    inner = patched_model(model)
    if backend == "inductor" and next(inner.parameters()).device.type == "cpu":
        _check_compiler()
    inner.rellax.compiled = _parts(inner)
    for part in inner.rellax.compiled:
        part.compile(dynamic=True, backend=backend)
    return model


def _parts(model: Any) -> list[nn.Module]:
    return [
        module
        for module in model.base_model.modules()
        if type(module).__name__.endswith("Norm")
        or (type(module).__name__.endswith("MLP") and not any(map(_is_special, module.modules())))
    ]


def _is_special(module: nn.Module) -> bool:
    return isinstance(module, (Projection, quantised.Frozen)) or quantised.describe(module) is not None


def _check_compiler() -> None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise InputError(
            f"compile: expected a C++ compiler on this machine, found none ({one_line(error)})"
        ) from None
