"""Eager mode goes around torch.library: the same results, and never where somebody else watches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rellax.ops
from rellax.errors import InputError
from rellax.ops import _eager, cflora
from rellax.testing import cases

OPERATORS = ("answer_loss", "cflora_linears", "gate_bank", "soft_prompt")
CASES = [(name, case) for name, (_, table) in cases.OPERATORS.items() for case in table]


def outputs_and_gradients(name: str, case: str | None = None) -> list[Tensor]:
    build, table = cases.OPERATORS[name]
    inputs = build(torch.float32, **table[case] if case else {})
    made = getattr(rellax.ops, name)(**inputs)
    outputs = list(made) if isinstance(made, tuple) else [made]
    roots = [y for y in outputs if y.requires_grad]
    leaves = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
    upstream = [torch.ones_like(y) for y in roots]
    return [*outputs, *(torch.autograd.grad(roots, leaves, upstream) if roots else ())]


def kinds(tensors: list[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in tensors]


@pytest.fixture
def library_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    library = cflora._forward._library

    def counted(*args: Any) -> Any:
        calls.append(args)
        return library(*args)

    monkeypatch.setattr(cflora._forward, "_library", counted)
    return calls


def layer(**options: Any) -> dict[str, Any]:
    return cases.cflora(torch.float32, **options)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_tangent_is_refused(name: str) -> None:
    """Forward mode has no formula here, and must not give zeros."""
    inputs = cases.OPERATORS[name][0](torch.float32)
    leaves = {key: x.detach() for key, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}
    assert leaves or name == "cflora_linears"
    for key, x in leaves.items():

        def of(value: Tensor, key: str = key) -> Any:
            return getattr(rellax.ops, name)(**{**inputs, key: value})

        with pytest.raises(InputError, match="tangent"):
            torch.func.jvp(of, (x,), (torch.ones_like(x),))
        with forward_ad.dual_level(), pytest.raises(InputError, match="tangent"):
            of(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("name", OPERATORS)
def test_the_same_bits_as_through_the_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    around = outputs_and_gradients(name)
    monkeypatch.setattr(_eager, "_is_eager", lambda tensors: False)
    through = outputs_and_gradients(name)
    assert len(around) == len(through) > 1
    assert all(torch.equal(a, b) for a, b in zip(around, through, strict=True))


def test_eager_calls_do_not_reach_the_library(library_calls: list[Any]) -> None:
    rellax.ops.cflora_linear(**layer()).sum().backward()
    with torch.no_grad():
        rellax.ops.cflora_linear(**layer())
    assert library_calls == []


class Watched(Tensor):
    """A tensor that is not plain."""


def test_modes_profilers_and_subclasses_see_the_operator(library_calls: list[Any]) -> None:
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch(), torch.no_grad():
        rellax.ops.cflora_linear(**layer())
    assert "rellax.cflora_linear.default" in seen
    with torch.profiler.profile() as profile, torch.no_grad():
        rellax.ops.cflora_linear(**layer())
    assert any("rellax::cflora_linear" in event.key for event in profile.key_averages())
    with torch.no_grad():
        rellax.ops.cflora_linear(**layer() | {"x": layer()["x"].detach().as_subclass(Watched)})
    assert len(library_calls) == 3


def test_function_modes_and_transforms_see_the_operator(library_calls: list[Any]) -> None:
    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    inputs = {name: x.detach() if isinstance(x, Tensor) else x for name, x in layer().items()}
    x = inputs.pop("x")

    def run(x: Tensor) -> Tensor:
        return rellax.ops.cflora_linear(x, **inputs).sum()

    with Watch():
        run(x)
    torch.func.functionalize(run)(x)
    assert len(library_calls) == 2


def test_a_negated_view_is_read_negated() -> None:
    """As the imaginary part of a conjugate is: in memory its numbers have the other sign."""
    inputs = layer()
    x = inputs["x"].detach()
    negated = torch._neg_view(-x)
    assert negated.is_neg()
    assert negated.is_contiguous()
    expected = rellax.ops.cflora_linear(**inputs | {"x": x})
    assert torch.equal(rellax.ops.cflora_linear(**inputs | {"x": negated}), expected)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_fake_tensors_get_shapes_alone(name: str, case: str) -> None:
    with FakeTensorMode():
        fake = outputs_and_gradients(name, case)
    assert all(isinstance(tensor, FakeTensor) for tensor in fake)
    assert kinds(fake) == kinds(outputs_and_gradients(name, case))


@pytest.mark.parametrize(("name", "case"), CASES)
def test_tensors_without_memory_get_shapes_alone(
    name: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = kinds(outputs_and_gradients(name, case))
    monkeypatch.setattr(cases, "device", lambda: torch.device("meta"))
    meta = outputs_and_gradients(name, case)
    assert all(tensor.is_meta for tensor in meta)
    assert kinds(meta) == expected


def test_kernels_get_pythons_numbers_in_place_of_numpys() -> None:
    given: list[Any] = []
    operator = _eager.Operator(SimpleNamespace(register_fake=None), lambda *args: given.extend(args))  # type: ignore[arg-type]
    operator(torch.ones(2), np.int64(3), np.float32(0.5), [1], None)
    assert [type(number) for number in given[1:3]] == [int, float]
    assert given[1:] == [3, 0.5, [1], None]


def test_a_second_derivative_is_refused() -> None:
    inputs = layer()
    y = rellax.ops.cflora_linear(**inputs)
    (dx,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        dx.sum().backward()


def test_a_result_that_is_not_used_gets_no_gradient_of_its_own() -> None:
    inputs = cases.cflora_set(torch.float32)
    first, *_ = rellax.ops.cflora_linears(**inputs)
    (alone,) = torch.autograd.grad(first.sum(), inputs["x"])
    names = {"weights": "weight", "biases": "bias", "loras_a": "lora_a", "loras_b": "lora_b", "gates": "gate"}
    single = {names.get(name, name): value[0] if name in names else value for name, value in inputs.items()}
    (expected,) = torch.autograd.grad(rellax.ops.cflora_linear(**single).sum(), single["x"])
    torch.testing.assert_close(alone, expected)
