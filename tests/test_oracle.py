"""The oracle fails where it should: a tolerance that nothing can exceed would prove nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rellax.testing import oracle


def eager(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1)


def scaled(x: Tensor, y: Tensor) -> Tensor:
    return eager(x, y) * 1.01


def wrong_gradient(x: Tensor, y: Tensor) -> Tensor:
    return eager(x, y.detach())


def unwritten(x: Tensor, y: Tensor) -> Tensor:
    return eager(x, y) + 0 * torch.empty(len(x))


def other_shape(x: Tensor, y: Tensor) -> Tensor:
    return eager(x, y)[:, None]


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(7, 129, generator=generator).to(dtype).requires_grad_() for name in "xy"}


@pytest.mark.parametrize("wrong", [scaled, wrong_gradient, unwritten, other_shape])
def test_finds(wrong: Callable[..., Tensor]) -> None:
    with pytest.raises(AssertionError, match=r"output 0|d y"):
        oracle.check(wrong, eager, inputs(torch.float32), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accepts_another_order_of_summation(dtype: torch.dtype) -> None:
    def backwards(x: Tensor, y: Tensor) -> Tensor:
        return (x.flip(-1).float() * y.flip(-1).float()).cumsum(-1)[:, -1].to(dtype)

    oracle.check(backwards, eager, inputs(dtype), dtype)


def test_finds_a_product_in_a_narrower_dtype() -> None:
    def narrow(x: Tensor, y: Tensor) -> Tensor:
        return (x.bfloat16() * y.bfloat16()).sum(-1).float()

    with pytest.raises(AssertionError, match="error"):
        oracle.check(narrow, eager, inputs(torch.float32), torch.float32)


def test_poison_ends_with_the_context() -> None:
    with oracle.poisoned_memory():
        assert torch.empty(9).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
