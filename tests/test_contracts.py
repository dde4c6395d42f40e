"""What holds for every operator: its contract with torch.library, torch.compile, its rooms, its backends."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import rellax.ops
from rellax.errors import InputError
from rellax.ops import _eager, _register
from rellax.ops._register import Backends
from rellax.testing.cases import OPERATORS

ROOT = Path(__file__).parent.parent
CASES = [(operator, case) for operator, (_, table) in OPERATORS.items() for case in table]
DIFFERENTIABLE = [operator for operator in OPERATORS if operator not in ("history_topk", "item_topk")]


def inputs_of(operator: str, case: str) -> dict[str, Any]:
    build, table = OPERATORS[operator]
    inputs: dict[str, Any] = build(torch.float32, **table[case])
    return inputs


def leaves_of(inputs: object) -> list[Tensor]:
    return [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]


def run(function: Callable[..., Any], inputs: dict[str, Any]) -> list[Tensor]:
    """Outputs, and the gradients of the sum of their squares."""
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = leaves_of(inputs)
    roots = [output.square().sum() for output in outputs if output.requires_grad]
    return [*outputs, *(torch.autograd.grad(sum(roots), leaves) if leaves else ())]


class Recorder(TorchDispatchMode):
    """Keeps the calls of rellax's operators, forward and backward, as PyTorch's dispatcher sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "rellax":
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))


def test_every_operator_has_cases() -> None:
    """But for what is no operator: it prepares an argument of one."""
    assert set(OPERATORS) == set(rellax.ops.__all__) - {"cflora_tiles"}


@pytest.mark.parametrize("operator", OPERATORS)
def test_one_stem_in_every_room(operator: str) -> None:
    stem = getattr(rellax.ops, operator).__module__.removeprefix("rellax.ops.")
    for file in (f"rellax/reference/{stem}.py", f"tests/test_{stem}.py"):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize(("operator", "case"), CASES)
def test_opcheck(operator: str, case: str) -> None:
    with Recorder() as recorder:
        run(getattr(rellax.ops, operator), inputs_of(operator, case))
    names = [op.name() for op, _ in recorder.calls if op.name() != "rellax::answer_loss_head_backward"]
    differentiable = operator in DIFFERENTIABLE
    defined = {"cflora_linears": "cflora_linear", "cflora_update": "cflora_linear"}.get(operator, operator)
    assert names == [f"rellax::{defined}"] + differentiable * [f"rellax::{defined}_backward"]
    torch.library.opcheck(*recorder.calls[0])
    for backward, args in recorder.calls[1:]:
        torch.library.opcheck(backward, tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, args))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("operator", "case"), CASES)
def test_compiles_whole(operator: str, case: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    function = getattr(rellax.ops, operator)
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    inputs = inputs_of(operator, case)
    torch.manual_seed(0)
    expected = run(function, inputs)
    torch.manual_seed(0)
    for actual, eager in zip(run(compiled, inputs), expected, strict=True):
        assert torch.equal(actual, eager)


@pytest.mark.parametrize(
    ("operator", "case", "name"),
    [
        ("answer_loss", "vocab", "positions"),
        ("answer_loss", "vocab", "labels"),
        ("answer_loss", "choice", "labels"),
        ("cflora_linear", "packed", "cu_seqlens"),
        ("history_topk", "every-behaviour", "items"),
        ("history_topk", "queries", "user"),
        ("item_topk", "queries", "queries"),
    ],
)
def test_values_are_checked_in_compiled_graphs_too(operator: str, case: str, name: str) -> None:
    """On a CPU, where C++ would read and write beside the arrays."""
    torch._dynamo.reset()
    compiled = torch.compile(getattr(rellax.ops, operator), fullgraph=True, backend="aot_eager")
    inputs = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, inputs_of(operator, case))
    compiled(**inputs)
    inputs[name][-1] = 10**6
    with pytest.raises(InputError, match=f"^{name}: expected"):
        compiled(**inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("operator", "case"), CASES)
def test_the_default_dtype_changes_nothing(operator: str, case: str, dtype: torch.dtype) -> None:
    function, inputs = getattr(rellax.ops, operator), inputs_of(operator, case)
    expected = run(function, inputs)
    torch.set_default_dtype(dtype)
    try:
        actual = run(function, inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "library"])
@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_outputs_may_be_changed_in_place(
    operator: str, eager: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of torch's own layers may."""
    if not eager:
        monkeypatch.setattr(_eager, "_is_eager", lambda tensors: False)
    inputs = inputs_of(operator, next(iter(OPERATORS[operator][1])))
    gradients = []
    for change in (lambda y: y * 2, lambda y: y.mul_(2)):
        outputs = getattr(rellax.ops, operator)(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        roots = [change(output).sum() for output in outputs if output.requires_grad]
        gradients.append(torch.autograd.grad(roots, leaves_of(inputs)))
    for doubled, in_place in zip(*gradients, strict=True):
        assert torch.equal(doubled, in_place), backend


def spread(value: Any) -> Any:
    """A tensor with the same values, each of them beside another one in memory."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    other = value.detach() + 1
    return torch.stack([value.detach(), other], dim=-1)[..., 0].requires_grad_(value.requires_grad)


@pytest.mark.parametrize(("operator", "case"), CASES)
def test_no_tensor_need_be_contiguous(operator: str, case: str, backend: str) -> None:
    inputs = inputs_of(operator, case)
    function = getattr(rellax.ops, operator)
    found = run(function, {name: tree_map(spread, value) for name, value in inputs.items()})
    for one, expected in zip(found, run(function, inputs), strict=True):
        size = expected.double().nan_to_num(neginf=0.0).abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(
            one, expected, rtol=0, atol=1e-5 * size, equal_nan=True, msg=lambda m: f"{backend}: {m}"
        )


def transposed(value: Any) -> Any:
    """A matrix or a stack of them with the same values, column by column in memory."""
    if not isinstance(value, Tensor) or value.dim() < 2 or not value.is_floating_point():
        return value
    return value.detach().mT.contiguous().mT.requires_grad_(value.requires_grad)


@pytest.mark.parametrize(
    ("operator", "case"),
    [(operator, case) for operator, case in CASES if case in ("plain", "packed", "vocab", "frozen-head")],
)
def test_fakes_tell_the_strides_of_any_layout(operator: str, case: str, backend: str) -> None:
    inputs = {name: tree_map(transposed, value) for name, value in inputs_of(operator, case).items()}
    with Recorder() as recorder:
        run(getattr(rellax.ops, operator), inputs)
    assert len(recorder.calls) >= 2, backend  # a trained head has a backward pass of its own
    for op, args in recorder.calls:
        args = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, args)
        torch.library.opcheck(op, args, test_utils="test_faketensor")


def test_all_operators_in_one_graph_of_inductor() -> None:
    """It generates code around the operators: the fakes must tell the real sizes, strides and dtypes."""
    torch._dynamo.reset()
    inputs = {operator: inputs_of(operator, next(iter(table))) for operator, (_, table) in OPERATORS.items()}
    leaves = leaves_of(inputs)

    def total() -> Tensor:
        value = torch.zeros((), device=leaves[0].device)
        for operator, call in inputs.items():
            outputs = getattr(rellax.ops, operator)(**call)
            for output in outputs if isinstance(outputs, tuple) else (outputs,):
                value = value + output.double().nan_to_num(neginf=0.0).sin().sum()
        return value

    expected, actual = total(), torch.compile(total, fullgraph=True)()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves))


CPU, CUDA, OTHER = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


def plus_one(x: Tensor) -> Tensor:
    return x + 1


def twice(x: Tensor) -> Tensor:
    return 2 * x


def backends(*kernels: str) -> Backends:
    return Backends(
        "op",
        plus_one,
        cpp=twice if "cpp" in kernels else None,
        triton="torch:neg" if "triton" in kernels else None,
    )


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The optional modules that seem to be there; a test may take some away before it asks for a backend."""
    there = {"rellax._C", "triton"}
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> object:
        return name in there or None if name in ("rellax._C", "triton") else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.delenv("RELLAX_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cached = (_register.extension_built, _register.triton_installed)
    for function in cached:
        function.cache_clear()
    yield there
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize(
    ("device", "kernels", "expected"),
    [
        (CPU, ("cpp", "triton"), "cpp"),
        (CPU, ("triton",), "reference"),
        (CUDA, ("cpp", "triton"), "triton"),
        (CUDA, ("cpp",), "reference"),
        (OTHER, ("cpp", "triton"), "reference"),
    ],
    ids=str,
)
def test_the_device_chooses(
    installed: set[str], device: torch.device, kernels: tuple[str, ...], expected: str
) -> None:
    assert backends(*kernels).backend(device) == expected


def test_the_dtype_chooses(installed: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = Backends("op", plus_one, cpp=twice, cpp_dtypes=(torch.float32,))
    assert narrow.backend(CPU, torch.float32) == "cpp"
    assert narrow.backend(CPU, torch.float64) == "reference"
    monkeypatch.setenv("RELLAX_BACKEND", "cpp")
    with pytest.raises(
        InputError, match=r"op cannot run on it, its C\+\+ kernel does not take torch.float64"
    ):
        narrow.backend(CPU, torch.float64)


def test_the_environment_chooses(installed: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    probe = _register.operator("probe", plus_one, cpp=twice, triton="torch:neg")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for wanted, expected in (("reference", 4.0), ("cpp", 6.0), ("triton", -3.0), ("", 6.0)):
        monkeypatch.setenv("RELLAX_BACKEND", wanted)
        assert probe(torch.tensor(3.0)).item() == expected
    monkeypatch.setenv("RELLAX_BACKEND", "reference")
    assert backends("triton").backend(CUDA) == "reference"


@pytest.mark.parametrize(
    ("wanted", "kernels", "device", "missing", "message"),
    [
        ("fast", ("cpp", "triton"), CPU, None, "expected one of reference, cpp, triton, got 'fast'"),
        ("cpp", ("triton",), CPU, None, "op cannot run on it, it has no C"),
        ("cpp", ("cpp",), CUDA, None, "op cannot run on it, its tensors are on cuda"),
        ("triton", ("cpp",), CUDA, None, "op cannot run on it, it has no Triton kernel"),
        ("triton", ("triton",), CPU, None, "op cannot run on it, its tensors are on cpu"),
        ("triton", ("triton",), CUDA, "triton", "op cannot run on it, Triton is not installed"),
    ],
)
def test_a_backend_that_cannot_run_is_an_error(
    installed: set[str],
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    kernels: tuple[str, ...],
    device: torch.device,
    missing: str | None,
    message: str,
) -> None:
    installed.discard(missing or "")
    monkeypatch.setenv("RELLAX_BACKEND", wanted)
    with pytest.raises(InputError, match=message):
        backends(*kernels).backend(device)


def test_a_missing_extension_is_said_once(installed: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    installed.discard("rellax._C")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [backends("cpp").backend(CPU) for _ in range(2)] == ["reference", "reference"]
    assert len(caught) == 1
    assert "the C++ extension is not built" in str(caught[0].message)
    monkeypatch.setenv("RELLAX_BACKEND", "cpp")
    with pytest.raises(InputError, match="the extension is not built"):
        backends("cpp").backend(CPU)


def test_the_environment_reaches_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELLAX_BACKEND", "none")
    for operator, (_, table) in OPERATORS.items():
        with pytest.raises(InputError, match="RELLAX_BACKEND"):
            getattr(rellax.ops, operator)(**inputs_of(operator, next(iter(table))))


BARE = """
import socket, sys
sys.modules["triton"] = None
socket.socket.connect = socket.getaddrinfo = None
import torch
from rellax.ops import gate_bank
u, zeros = torch.ones(1, 3), torch.zeros(1, 3)
w1, b1, w2, b2 = torch.zeros(1, 2, 3), torch.zeros(1, 2), torch.zeros(1, 1, 2), torch.ones(1, 1)
gate = gate_bank(u, zeros, zeros, w1, b1, w2, b2)
assert gate.item() == 1.0
assert not torch.cuda.is_initialized()
"""


def test_works_without_triton_network_and_gpu() -> None:
    subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, check=True, timeout=600)
