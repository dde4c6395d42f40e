"""The way around ``torch.library`` in eager mode.

Its wrappers and autograd function are Python: on a CPU 0.2 to 0.3 ms for a forward and a backward pass whose
code has left the caches. Where nothing but autograd watches, an operator runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from rellax.errors import InputError

_PLAIN = (Tensor, torch.nn.Parameter)
_transform: Callable[[], Any]
try:
    # Names that torch does not promise to keep: without one of them nobody knows who watches.
    _dispatch_modes = torch._C._len_torch_dispatch_stack
    _function_modes = torch._C._len_torch_function_stack
    _transform = torch._C._functorch.peek_interpreter_stack
    _is_profiled = torch.autograd._profiler_enabled
except AttributeError:
    _transform = object


class Operator:
    """A ``torch.library`` operator that eager mode calls directly.

    Args:
        library: the operator as compilers, modes, profilers and tensor subclasses see it.
        run: its implementation.
    """

    def __init__(self, library: torch.library.CustomOpDef, run: Callable[..., Any]) -> None:
        self.register_fake = library.register_fake
        self.run = run
        self._library = library
        self.setup_context: Callable[..., Any] | None = None
        self.backward: Callable[..., Any] | None = None

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """As ``torch.library.register_autograd``."""
        self._library.register_autograd(backward, setup_context=setup_context)
        self.setup_context, self.backward = setup_context, backward

    def __call__(self, *args: Any) -> Any:
        args = tuple(arg.item() if isinstance(arg, np.generic) else arg for arg in args)
        tensors = list(_tensors(args))
        if not torch.compiler.is_compiling():
            _check_no_tangent(tensors)
        if not _is_eager(tensors):
            return self._library(*args)
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return self.run(*args)
        if self.backward is None:
            return self._library(*args)  # which says that it has no gradient, once that is asked for
        *flat, lengths = _Function.apply(self, args, *tensors)
        parts = _grouped(lengths, iter(flat))
        return parts[0] if len(parts) == 1 else tuple(parts)


def _check_no_tangent(tensors: Sequence[Tensor]) -> None:
    """Raise where a derivative is carried forward: ``torch.library`` would give zeros in its place."""
    if getattr(forward_ad, "_current_level", 0) >= 0 and any(
        forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise InputError(
            "rellax.ops: expected tensors without a tangent, got one of forward-mode differentiation; "
            "backward() and torch.autograd.grad have the derivatives"
        )


def _is_eager(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing but autograd watches what is done with these tensors."""
    return (
        not torch.compiler.is_compiling()
        and all(type(t) in _PLAIN and not t.is_meta and not t.is_neg() for t in tensors)
        and _transform() is None
        and _dispatch_modes() == 0
        and _function_modes() == 0
        and not torch.jit.is_tracing()
        and not _is_profiled()
    )


class _Function(torch.autograd.Function):
    """What ``register_autograd`` makes of an operator whose arguments and results may be lists of tensors.

    Takes the arguments as one, for the operator, and their tensors one by one, for autograd. Gives the
    results' tensors, and how they are grouped.
    """

    @staticmethod
    def forward(ctx: Any, operator: Operator, args: tuple[Any, ...], *_: Tensor) -> tuple[Any, ...]:
        assert operator.setup_context is not None
        output = operator.run(*args)
        parts = output if isinstance(output, tuple) else (output,)
        ctx.operator = operator
        ctx.taken = [_places(arg) for arg in args]
        flags = iter(ctx.needs_input_grad[2:])
        ctx.needs_input_grad = tuple(_flags(places, flags) for places in ctx.taken)
        operator.setup_context(ctx, args, output)
        ctx.given = [len(part) if isinstance(part, list) else None for part in parts]
        return *_tensors(parts), ctx.given

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        found = ctx.operator.backward(ctx, *_grouped(ctx.given, iter(gradients)))
        found = found if isinstance(found, tuple) else (found,)
        flat: list[Any] = [None, None]
        for places, gradient in zip(ctx.taken, found, strict=True):
            if isinstance(places, bool):
                flat += [gradient] if places else []
            else:
                gradient = gradient or [None] * len(places)
                flat += [g for g, place in zip(gradient, places, strict=True) if place]
        return tuple(flat)


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    """All tensors among the arguments and in their lists, in order."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from (part for part in arg if isinstance(part, Tensor))


def _places(arg: Any) -> bool | list[bool]:
    """Whether an argument is a tensor; of a list, which elements are."""
    if isinstance(arg, (list, tuple)):
        return [isinstance(part, Tensor) for part in arg]
    return isinstance(arg, Tensor)


def _flags(places: bool | list[bool], needed: Iterator[bool]) -> bool | list[bool]:
    """Which gradients are wanted, in the shape of the argument."""
    if isinstance(places, bool):
        return places and next(needed)
    return [place and next(needed) for place in places]


def _grouped(lengths: Sequence[int | None], flat: Iterator[Any]) -> list[Any]:
    """Results one by one, as the operator gives them: of a length, as a list."""
    return [next(flat) if n is None else [next(flat) for _ in range(n)] for n in lengths]
