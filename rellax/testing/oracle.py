"""The only tolerances.

An operator passes where its error against fp64 is at most twice that of an eager PyTorch formulation in the
operator's own dtype, plus a few units in the last place of the largest value, so that a lucky rounding of the
yardstick fails nobody. This holds for every output and every gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_leaves_with_path, tree_map

FACTOR = 2.0
ULPS = 2.0
ULPS_OF_FEW = 16.0
"""In place of ULPS for examples of any size: over a few values the yardstick is often exact by luck."""


def check(
    operator: Callable[..., Any], eager: Callable[..., Any], inputs: Mapping[str, Any], dtype: torch.dtype
) -> float:
    """Assert that `operator` computes what `eager` does, as exactly as `dtype` allows.

    Returns the largest part of its tolerance that any tensor takes up, at most 1.

    Args:
        operator: the public function under test; its uninitialised memory holds NaN.
        eager: an independent formulation with the same keywords, in plain differentiable PyTorch.
        inputs: the keywords of both; tensors that require grad are differentiated.
        dtype: the narrowest floating dtype among the inputs.
    """
    truth = _differentiate(eager, tree_map(_widen, dict(inputs)), dtype)
    yardstick = _differentiate(eager, inputs, dtype)
    with poisoned_memory():
        actual = _differentiate(operator, inputs, dtype)
    assert actual.keys() == truth.keys()
    shares = [check_tensor(name, actual[name], yardstick[name], truth[name], dtype) for name in truth]
    return max(shares, default=0.0)


def check_tensor(name: str, actual: Tensor, yardstick: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """Assert that the largest error of `actual` is within the tolerance, and return it as a part of that.

    `name` is for the message.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return 0.0
    error = (actual.double() - truth).abs().max().item()
    eager_error = (yardstick.double() - truth).abs().max().item()
    allowed = FACTOR * eager_error + ULPS * torch.finfo(dtype).eps * truth.abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} (eager: {eager_error:.3g})"
    return error / allowed if allowed else 0.0


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within: torch.empty and its like are filled with NaN (integers: their largest value)."""
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def _differentiate(
    function: Callable[..., Any], inputs: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """All outputs, and the gradients for random upstream gradients that are exact in `dtype`."""
    inputs = tree_map(_leaf, dict(inputs))
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    wanted = {
        keystr(path).removeprefix("['").replace("']", "", 1): x
        for path, x in tree_leaves_with_path(inputs)
        if isinstance(x, Tensor) and x.requires_grad
    }
    roots = [output for output in outputs if output.requires_grad]
    if wanted:
        generator = torch.Generator().manual_seed(0)
        upstream = [
            torch.randn(root.shape, generator=generator, dtype=torch.float64).to(dtype).to(root)
            for root in roots
        ]
        gradients = torch.autograd.grad(roots, list(wanted.values()), upstream, materialize_grads=True)
        results |= {f"d {name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}
    return results


def _leaf(value: Any) -> Any:
    """A leaf of the same memory and strides: gradients are this run's own."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value
