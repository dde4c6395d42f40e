"""``rellax::gate_bank`` against M small multi-layer perceptrons."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rellax.errors import InputError
from rellax.ops import gate_bank
from rellax.testing import oracle
from rellax.testing.cases import DTYPES, GATE_BANK
from rellax.testing.cases import gate_bank as inputs_of


def naive(
    u: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """One projection after another, in the parameters' dtype, the way nn.Sequential would."""
    gates = []
    for m in range(len(w1)):
        normed = F.layer_norm(u.to(w1.dtype), u.shape[1:], ln_weight[m], ln_bias[m], eps)
        flat = F.linear(F.gelu(F.linear(normed, w1[m], b1[m])), w2[m], b2[m])
        r = round((w1.shape[1] / 2) ** 0.5)
        if w2.shape[1] == r:
            flat = (flat[:, :, None] * torch.eye(r).to(flat)).flatten(1)
        gates.append(flat.view(len(u), r, r))
    return torch.stack(gates)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GATE_BANK)
def test_equals_separate_perceptrons(case: str, dtype: torch.dtype, backend: str) -> None:
    oracle.check(gate_bank, naive, inputs_of(dtype, **GATE_BANK[case]), dtype)


@pytest.mark.parametrize("case", ["plain", "diagonal"])
def test_gradients_in_fp64(case: str) -> None:
    inputs = inputs_of(torch.float64, **{**GATE_BANK[case], "d_u": 3, "r": 2})
    assert torch.autograd.gradcheck(gate_bank, list(inputs.values()))


def test_the_widest_dtype_computes() -> None:
    inputs = inputs_of(torch.float64, u_dtype=torch.float32)
    gates = gate_bank(**inputs)
    assert gates.dtype == torch.float64
    torch.testing.assert_close(gates, naive(**inputs))


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_init_is_exactly_the_identity(diagonal: bool, dtype: torch.dtype, backend: str) -> None:
    inputs = inputs_of(dtype, instances=5, r=3, diagonal=diagonal)
    b2 = torch.ones(2, 3) if diagonal else torch.eye(3).flatten().repeat(2, 1)
    inputs |= {"w2": torch.zeros_like(inputs["w2"]), "b2": b2.to(inputs["b2"])}
    gates = gate_bank(**inputs)
    assert gates.dtype == torch.float32
    assert torch.equal(gates, torch.eye(3).to(gates).expand(2, 5, 3, 3))


def test_rows_of_the_gate_are_consecutive_outputs(backend: str) -> None:
    inputs = inputs_of(torch.float32, instances=1, projections=1, r=2)
    inputs |= {"w2": torch.zeros_like(inputs["w2"]), "b2": torch.arange(4.0).to(inputs["b2"])[None]}
    assert gate_bank(**inputs)[0, 0].tolist() == [[0.0, 1.0], [2.0, 3.0]]


def test_gelu_is_the_exact_one() -> None:
    """At -3 the tanh approximation is off by 4e-4 of its value, far above fp64 rounding."""
    u = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
    one, zero = torch.ones(1, 2, 1).to(u), torch.zeros(1, 2).to(u)
    gate = gate_bank(u, zero, zero, one.expand(1, 2, 2), torch.full_like(zero, -3.0), one.mT / 2, zero[:, :1])
    expected = -3 * 0.5 * torch.erfc(torch.tensor(3 / 2**0.5, dtype=torch.float64))
    torch.testing.assert_close(gate[0, 0, 0, 0], expected)


def test_gelu_everywhere(backend: str) -> None:
    """W1 = 0 and W2 = I: hidden unit j is b1_j, and output j its GELU. Each projection has its own range."""
    ranges = torch.tensor([0.01, 1.0, 3.0, 6.0, 14.0, 1e36])
    shape = {"projections": len(ranges), "instances": 1, "d_u": 1, "r": 8}
    inputs = inputs_of(torch.float32, **shape)
    outputs, hidden = inputs["w2"].shape[1:]
    b1 = torch.linspace(-1, 1, hidden) * ranges[:, None]
    for half in (slice(0, outputs), slice(outputs, hidden)):
        selection = torch.eye(hidden)[half].expand_as(inputs["w2"])
        values = {"w1": torch.zeros_like(inputs["w1"]), "b1": b1, "w2": selection}
        values = {name: value.to(inputs["u"]).requires_grad_() for name, value in values.items()}
        call = inputs | values | {"b2": torch.zeros_like(inputs["b2"])}
        results = []
        for function, dtype in ((gate_bank, None), (naive, None), (naive, torch.float64)):
            arguments = {name: value.detach().to(dtype).requires_grad_() for name, value in call.items()}
            gates = function(**arguments)
            (slopes,) = torch.autograd.grad(gates.sum(), arguments["b1"])
            results.append((gates.detach(), slopes))
        for name, *values in zip(("GELU", "derivative"), *results, strict=True):
            for m, limit in enumerate(ranges):
                oracle.check_tensor(f"{name} up to {limit}", *(value[m] for value in values), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_eps_is_added_to_the_variance(dtype: torch.dtype) -> None:
    inputs = inputs_of(dtype)
    torch.testing.assert_close(gate_bank(**inputs, eps=0.5), naive(**inputs, eps=0.5))


def test_gates_stay_fp32_under_autocast() -> None:
    inputs = inputs_of(torch.float32)
    expected = gate_bank(**inputs)
    with torch.autocast(inputs["u"].device.type, torch.bfloat16):
        gates = gate_bank(**inputs)
    assert gates.dtype == torch.float32
    assert torch.equal(gates, expected)


def gates_and_gradients(inputs: dict[str, Tensor]) -> list[Tensor]:
    gates = gate_bank(**inputs)
    return [gates, *torch.autograd.grad(gates.square().sum(), list(inputs.values()))]


def test_same_bits_every_time(backend: str) -> None:
    inputs = inputs_of(torch.float32, **GATE_BANK["odd"])
    first, second = gates_and_gradients(inputs), gates_and_gradients(inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_same_bits_on_any_number_of_threads() -> None:
    """And with more projections than the shares in which the C++ kernel adds up the gradient of u."""
    inputs = inputs_of(torch.float32, projections=70, instances=130, d_u=20, r=4)
    oracle.check(gate_bank, naive, inputs, torch.float32)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            runs.append(gates_and_gradients(inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


WRONG = {
    "u": torch.zeros(3, 4, 5),
    "ln_weight": torch.zeros(2, 8),
    "ln_bias": torch.zeros(1, 9),
    "w1": torch.zeros(2, 7, 9),
    "b1": torch.zeros(2, 8, dtype=torch.float64),
    "w2": torch.zeros(2, 3, 8),
    "w2 of another dtype": torch.zeros(2, 4, 8, dtype=torch.float64),
    "b2": torch.zeros(2, 2),
    "eps": -1e-5,
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_argument(case: str) -> None:
    name, wrong = case.split()[0], WRONG[case]
    inputs = inputs_of(torch.float32)
    inputs[name] = wrong.to(inputs["u"].device) if isinstance(wrong, Tensor) else wrong
    with pytest.raises(InputError, match=f"^{name}: expected "):
        gate_bank(**inputs)
