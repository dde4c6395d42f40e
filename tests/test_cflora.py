"""``rellax::cflora_linear`` against loops over instances and against its special cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rellax.errors import InputError
from rellax.nn import CFLoRALinear
from rellax.ops import cflora_linear, cflora_linears, cflora_tiles, cflora_update
from rellax.reference._numerics import keep_mask
from rellax.testing import oracle
from rellax.testing.cases import CFLORA, CFLORA_SET, CFLORA_UPDATE, DTYPES, cflora, device
from rellax.testing.cases import cflora_set as build_set
from rellax.testing.cases import cflora_update as build_update


def naive(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """One instance after another, in x's dtype."""
    rows = x.flatten(0, -2)
    lengths = [x.shape[1]] * x.shape[0] if cu_seqlens is None else cu_seqlens.diff().tolist()
    keep = torch.ones_like(rows) if seed is None else keep_mask(seed, *rows.shape, dropout).to(x)
    updates = [rows.new_empty(0, weight.shape[0])]
    for b, part in enumerate((rows * keep / (1 - dropout)).split(lengths)):
        z = part @ lora_a.to(x.dtype).T
        if gate is not None:
            z = z @ gate[b].to(x.dtype)
        updates.append(scale * z @ lora_b.to(x.dtype).T)
    return F.linear(x, weight, bias) + torch.cat(updates).view(*x.shape[:-1], weight.shape[0])


def naive_set(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    loras_a: list[Tensor],
    loras_b: list[Tensor],
    gates: list[Tensor] | None,
    scale: float,
    **options: Any,
) -> tuple[Tensor, ...]:
    """One layer after another."""
    layers = zip(weights, biases, loras_a, loras_b, gates or [None] * len(weights), strict=True)
    return tuple(naive(x, *layer, scale, **options) for layer in layers)


def naive_update(
    base: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, *rest: Any, **options: Any
) -> Tensor:
    nothing = x.new_zeros(lora_b.shape[0], x.shape[-1])
    return base + naive(x, nothing, None, lora_a, lora_b, *rest, **options)


def skip_unless_taken(backend: str, dtype: torch.dtype) -> None:
    """Triton's interpreter multiplies the bits of bf16; C++ leaves fp16 to the reference."""
    if backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter cannot multiply bf16")
    if backend == "cpp" and dtype == torch.float16:
        pytest.skip("the C++ kernels do not take fp16")


def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return torch.autograd.grad(y, inputs, upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CFLORA)
def test_equals_a_loop_over_instances(case: str, dtype: torch.dtype, backend: str) -> None:
    skip_unless_taken(backend, dtype)
    oracle.check(cflora_linear, naive, cflora(dtype, **CFLORA[case]), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CFLORA_SET)
def test_a_set_equals_its_layers(case: str, dtype: torch.dtype, backend: str) -> None:
    skip_unless_taken(backend, dtype)
    oracle.check(cflora_linears, naive_set, build_set(dtype, **CFLORA_SET[case]), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CFLORA_UPDATE)
def test_an_update_is_added_to_what_the_layer_gave(case: str, dtype: torch.dtype, backend: str) -> None:
    skip_unless_taken(backend, dtype)
    inputs = build_update(dtype, **CFLORA_UPDATE[case])
    before = inputs["base"].clone()
    oracle.check(cflora_update, naive_update, inputs, dtype)
    assert torch.equal(inputs["base"], before)


@pytest.mark.parametrize("case", ["plain", "packed-empty-instances", "packed-dropout", "no-gate"])
def test_gradients_in_fp64(case: str) -> None:
    inputs = cflora(torch.float64, **{**CFLORA[case], "d_in": 5, "d_out": 3, "r": 2})
    differentiated = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad]

    def function(*tensors: Tensor) -> Tensor:
        return cflora_linear(**{**inputs, **dict(zip(differentiated, tensors, strict=True))})

    assert torch.autograd.gradcheck(function, [inputs[name] for name in differentiated])


def test_identity_gate_is_plain_lora() -> None:
    """And plain LoRA is what two linear layers beside the frozen one compute."""
    inputs = cflora(torch.float64)
    identity = torch.eye(4, dtype=torch.float64, device=inputs["x"].device).expand(2, 4, 4)
    down, up = nn.Linear(33, 4, bias=False), nn.Linear(4, 9, bias=False)
    down.weight, up.weight = nn.Parameter(inputs["lora_a"]), nn.Parameter(inputs["lora_b"])
    expected = F.linear(inputs["x"], inputs["weight"], inputs["bias"]) + 2.0 * up(down(inputs["x"]))
    for gate in (identity, None):
        torch.testing.assert_close(cflora_linear(**{**inputs, "gate": gate}), expected)


def test_diagonal_gate_scales_each_component() -> None:
    inputs = cflora(torch.float64, gate="diagonal")
    x, weights = inputs["x"], inputs["gate"].diagonal(dim1=1, dim2=2)
    expected = F.linear(x, inputs["weight"], inputs["bias"])
    for i in range(4):
        component = torch.einsum("bld,d,o->blo", x, inputs["lora_a"][i], inputs["lora_b"][:, i])
        expected = expected + 2.0 * weights[:, i, None, None] * component
    torch.testing.assert_close(cflora_linear(**inputs), expected)


def test_gate_is_on_the_right_of_a_row_vector(backend: str) -> None:
    """Down component 0 reaches up component 1 through G[0, 1]."""
    values = ([[[3.0]]], [[0.0]], [[1.0], [10.0]], [[100.0, 7.0]], [[[0.0, 5.0], [0.0, 0.0]]])
    x, weight, lora_a, lora_b, gate = (torch.tensor(value, device=device()) for value in values)
    y = cflora_linear(x, weight, None, lora_a, lora_b, gate, 1.0)
    assert y.item() == 3 * 1 * 5 * 7


def test_packed_equals_padded() -> None:
    lengths = [3, 0, 7, 5]
    packed = cflora(torch.float64, lengths=lengths, packed=True)
    token = torch.cat([torch.arange(length) + 7 * b for b, length in enumerate(lengths)])
    x = torch.zeros(4 * 7, 33, dtype=torch.float64, device=token.device).to(packed["x"])
    x = x.index_copy(0, token.to(x.device), packed["x"]).view(4, 7, 33)
    padded = cflora_linear(**{**packed, "x": x, "cu_seqlens": None}).flatten(0, 1)[token]
    y = cflora_linear(**packed)
    torch.testing.assert_close(y, padded)
    leaves = [packed[name] for name in ("x", "lora_a", "lora_b", "gate")]
    torch.testing.assert_close(gradients(y, *leaves), gradients(padded, *leaves))


def test_other_instances_do_not_change_an_instance(backend: str) -> None:
    inputs = cflora(torch.float32, lengths=[7, 7, 7])
    alone = {**inputs, "x": inputs["x"][1:2], "gate": inputs["gate"][1:2]}
    torch.testing.assert_close(cflora_linear(**inputs)[1:2], cflora_linear(**alone))


def test_backward_drops_what_forward_dropped(backend: str) -> None:
    """With x = 1, W = 0 and A = B = 1, y_t counts the kept elements, and dx marks them."""
    x, ones = torch.ones(1, 50, 64, device=device(), requires_grad=True), torch.ones(1, 64, device=device())
    y = cflora_linear(x, torch.zeros_like(ones), None, ones, ones[:, :1], None, 1.0, dropout=0.5)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert set(dx.unique().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(dx.sum(-1, keepdim=True), y.detach())


def test_dropout_mask_is_random_and_follows_the_seed() -> None:
    rows, columns, p = 512, 513, 0.3
    mask = keep_mask(torch.tensor(5), rows, columns, p).double()
    other = keep_mask(torch.tensor(5 + 2**40), rows, columns, p).double()
    five_sigma = 5 * (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.mean().item() - (1 - p)) < five_sigma
    for a, b in ((mask, other), (mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()) < 0.01
    for means in (mask.mean(0), mask.mean(1)):
        assert (means - (1 - p)).abs().max() < 5 * (p * (1 - p) / 512) ** 0.5


def test_dropout_draws_from_torchs_generator() -> None:
    inputs = cflora(torch.float32, dropout=0.5) | {"seed": None}
    torch.manual_seed(3)
    first, second = cflora_linear(**inputs), cflora_linear(**inputs)
    torch.manual_seed(3)
    assert torch.equal(cflora_linear(**inputs), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("d_in", [33, 257])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("train_lora", [False, True])
def test_what_is_saved_for_the_backward_pass(
    train_lora: bool, dropout: float, d_in: int, backend: str
) -> None:
    """Frozen A and B: h alone, T r numbers whatever d is. Where they are trained x stays, which was there."""
    inputs = cflora(torch.float32, lengths=[64, 64], d_in=d_in, train_lora=train_lora, dropout=dropout)
    there = {x.untyped_storage().data_ptr() for x in inputs.values() if isinstance(x, Tensor)}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        cflora_linear(**inputs)
    kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    assert (inputs["x"].untyped_storage().data_ptr() in kept) == train_lora
    assert sum(size for address, size in kept.items() if address not in there) == 4 * 128 * 4


def test_thousands_of_instances(backend: str) -> None:
    """Most of one token, some of none; a tile of tokens for each."""
    count = 100 if backend == "triton" and device().type == "cpu" else 4096
    lengths = [(1, 0, 1, 2)[b % 4] for b in range(count)]
    inputs = cflora(torch.float32, lengths=lengths, packed=True, d_in=5, d_out=3, r=2)
    oracle.check(cflora_linear, naive, inputs, torch.float32)
    assert cflora_linear(**inputs).isfinite().all()


def test_offsets_beyond_32_bits(backend: str) -> None:
    """Rows 2³¹ elements apart, in memory of which two rows are ever touched."""
    inputs = build_update(torch.float16 if backend == "triton" else torch.float32, lengths=[2])
    far = {name: far_apart(inputs[name]) for name in ("x", "base")}
    y, expected = cflora_update(**inputs | far), cflora_update(**inputs)
    torch.testing.assert_close(y, expected)
    upstream = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)
    near_leaves, far_leaves = ([call["x"], call["gate"]] for call in (inputs, inputs | far))
    near = torch.autograd.grad(expected, near_leaves, upstream)
    torch.testing.assert_close(torch.autograd.grad(y, far_leaves, far_apart(upstream)), near)


def far_apart(x: Tensor) -> Tensor:
    """x (1, 2, d) with 2³¹ elements from row to row."""
    room = x.new_empty(2**31 + x.shape[-1]).as_strided(x.shape, (2**32, 2**31, 1))
    return room.copy_(x.detach()).requires_grad_(x.requires_grad)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_same_bits_on_any_number_of_threads(dropout: float) -> None:
    """Of the update alone: torch's own product need not."""
    inputs = build_update(torch.float32, lengths=[900, 45], packed=True, d_in=200, d_out=130, dropout=dropout)
    leaves = [inputs[name] for name in ("x", "gate", "lora_a", "lora_b")]
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = cflora_update(**inputs)
            runs.append([y, *gradients(y, *leaves)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_changed_factor_is_seen(backend: str) -> None:
    """In place, by an optimiser's step and by load_state_dict: no backend keeps what it made of A and B."""
    layer = CFLoRALinear(33, 9, r=4, device=device())
    x = torch.randn(1, 5, 33).to(device())
    nn.init.normal_(layer.lora_b)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)

    def in_place() -> None:
        with torch.no_grad():
            layer.lora_a.mul_(2)

    def step() -> None:
        layer(x).sum().backward()
        optimiser.step()

    def load() -> None:
        layer.load_state_dict({name: 0.5 * value for name, value in layer.state_dict().items()})

    seen = [layer(x)]
    for change in (in_place, step, load):
        change()
        seen.append(layer(x))
        arguments = (x, layer.weight, layer.bias, layer.lora_a, layer.lora_b, None, layer.scale)
        torch.testing.assert_close(seen[-1], naive(*arguments), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(seen[-1], seen[-2])


def test_a_probability_next_to_one_drops_all(backend: str) -> None:
    """Rounded to 32 bits it would be 1, which no hash reaches."""
    inputs = cflora(torch.float32, dropout=1 - 2**-40)
    y = cflora_linear(**inputs)
    torch.testing.assert_close(y, F.linear(inputs["x"], inputs["weight"], inputs["bias"]), msg=backend)
    dx, da = gradients(y, inputs["x"], inputs["lora_a"])
    (expected,) = gradients(F.linear(inputs["x"], inputs["weight"]), inputs["x"])
    torch.testing.assert_close(dx, expected)
    assert not da.any()


@pytest.mark.parametrize("case", ["plain", "packed", "dropout"])
def test_same_bits_every_time(case: str, backend: str) -> None:
    inputs = cflora(torch.float32, **CFLORA[case])
    leaves = [inputs[name] for name in ("x", "gate", "lora_a", "lora_b")]
    first, second = cflora_linear(**inputs), cflora_linear(**inputs)
    assert torch.equal(first, second)
    for a, b in zip(gradients(first, *leaves), gradients(second, *leaves), strict=True):
        assert torch.equal(a, b)


def test_autocast_runs_as_if_in_bf16() -> None:
    """x and W are narrowed; the gates stay fp32, where autocast alone would narrow their product too."""
    inputs = cflora(torch.float32)
    narrow = {name: inputs[name].bfloat16() for name in ("x", "weight", "bias")}
    expected = cflora_linear(**{**inputs, **narrow})
    with torch.autocast(inputs["x"].device.type, torch.bfloat16):
        y = cflora_linear(**inputs)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    assert all(g.dtype == torch.float32 for g in gradients(y, inputs["x"], inputs["gate"]))


WRONG = {
    "x": torch.zeros(7, 33),
    "weight": torch.zeros(9, 32),
    "bias": torch.zeros(8),
    "lora_a": torch.zeros(4, 32),
    "lora_b": torch.zeros(9, 5),
    "lora_b of another d_out": torch.zeros(8, 4),
    "gate": torch.zeros(3, 4, 4),
    "scale": float("inf"),
    "scale of no float": 10**400,
    "tiles": torch.zeros(3, dtype=torch.int32),
    "dropout": 1.0,
    "seed": torch.zeros(()),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_argument(case: str) -> None:
    name, wrong = case.split()[0], WRONG[case]
    inputs = cflora(torch.float32) | {name: wrong}
    if isinstance(wrong, Tensor):
        inputs[name] = wrong.to(inputs["weight"].device)
    with pytest.raises(InputError, match=f"^{name}: expected "):
        cflora_linear(**inputs)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lora_a", {"loras_a": lambda given: [given[0], given[1][:3], given[2]]}),
        ("gates", {"gates": lambda given: given[:2]}),
        ("weights", {name: lambda given: [] for name in ("weights", "biases", "loras_a", "loras_b")}),
    ],
    ids=["another rank", "too few", "none"],
)
def test_errors_name_the_list(name: str, change: dict[str, Any]) -> None:
    inputs = build_set(torch.float32)
    inputs |= {name: changed(inputs[name]) for name, changed in change.items()}
    with pytest.raises(InputError, match=f"^{name}: expected "):
        cflora_linears(**inputs)


def test_an_update_is_of_the_base_s_size_and_dtype() -> None:
    inputs = build_update(torch.float32)
    for wrong in (inputs["base"][..., :-1], inputs["base"].double()):
        with pytest.raises(InputError, match=r"^base: expected "):
            cflora_update(**inputs | {"base": wrong})


def test_under_autocast_an_update_has_the_base_s_dtype() -> None:
    inputs = build_update(torch.float32)
    narrow = inputs | {name: inputs[name].bfloat16() for name in ("x", "base")}
    with torch.autocast(inputs["x"].device.type, torch.bfloat16):
        y = cflora_update(**inputs | {"base": narrow["base"]})
    assert torch.equal(y, cflora_update(**narrow))


def test_autocast_leaves_fp64_as_it_is() -> None:
    inputs = cflora(torch.float64)
    expected = cflora_linear(**inputs)
    with torch.autocast(inputs["x"].device.type, torch.bfloat16):
        assert torch.equal(cflora_linear(**inputs), expected)


@pytest.mark.parametrize("offsets", [[0, 2], torch.zeros(1, 2).int(), torch.tensor([0, 3]).int()])
def test_a_table_of_tiles_is_of_offsets(offsets: Any) -> None:
    with pytest.raises(InputError, match=r"^cu_seqlens: expected "):
        cflora_tiles(offsets, 2)


@pytest.mark.parametrize("offsets", [[], [0, 9, 13], [0, 15, 14], [1, 14], [0, 7, 7, 14]])
def test_wrong_offsets(offsets: list[int]) -> None:
    inputs = cflora(torch.float32, lengths=[5, 9], packed=True)
    inputs |= {"cu_seqlens": torch.tensor(offsets, dtype=torch.int32)} | ({} if offsets else {"gate": None})
    with pytest.raises(InputError, match=r"^cu_seqlens: expected "):
        cflora_linear(**inputs)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_frozen_tensors_must_not_require_gradients(name: str) -> None:
    inputs = cflora(torch.float32)
    inputs[name].requires_grad_()
    with pytest.raises(InputError, match=f"^{name}: expected a frozen tensor"):
        cflora_linear(**inputs)
    with torch.no_grad():
        cflora_linear(**inputs)
