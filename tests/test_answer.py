"""``rellax::answer_loss`` against full logits and ``torch.nn.functional.cross_entropy``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rellax.errors import InputError
from rellax.ops import answer_loss
from rellax.reference import answer as reference
from rellax.testing import oracle
from rellax.testing.cases import ANSWER, DTYPES
from rellax.testing.cases import answer as inputs_of


def naive(
    hidden: Tensor,
    lm_head_weight: Tensor,
    positions: Tensor,
    labels: Tensor,
    choice_ids: Sequence[int] | None = None,
    loss: str | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    denominator: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The logits of every token over the whole vocabulary, widened for the loss as in transformers."""
    logits = F.linear(hidden, lm_head_weight, bias).flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits[positions]
    answers = logits[:, list(choice_ids or ())]
    if loss is None and choice_ids is not None:
        labels = torch.tensor(
            [-100 if label == -100 else choice_ids.index(label) for label in labels.tolist()]
        )
        logits = answers
    total = denominator or max((labels != -100).sum().item(), 1)
    return F.cross_entropy(logits, labels.to(logits.device), reduction="sum") / total, answers.detach()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ANSWER)
def test_equals_cross_entropy_of_full_logits(case: str, dtype: torch.dtype) -> None:
    inputs = inputs_of(dtype, **ANSWER[case])
    oracle.check(answer_loss, naive, inputs, dtype)
    loss, logits = answer_loss(**inputs)
    assert loss.dtype == logits.dtype == torch.float32
    assert not logits.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ANSWER)
@pytest.mark.parametrize("name", ["reference", "triton"])
def test_backends_that_are_no_default_on_a_cpu(
    name: str, case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELLAX_BACKEND", name)
    oracle.check(answer_loss, naive, inputs_of(dtype, **ANSWER[case]), dtype)


@pytest.mark.usefixtures("backend")
def test_rows_and_vocabulary_in_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than go over the head together, and more of the vocabulary than one slice or block."""
    monkeypatch.setattr("rellax.kernels.answer._LOGITS", 40 * 4097)
    inputs = inputs_of(torch.float32, shape=(70,), vocabulary=4097, d=33, n=67, bias=True, train_head=False)
    inputs["bias"] += torch.linspace(0, 5, 4097).to(inputs["bias"])  # the largest logit keeps growing
    inputs["labels"][:3] = torch.tensor([0, 4095, 4096])
    oracle.check(answer_loss, naive, inputs, torch.float32)


@pytest.mark.usefixtures("backend")
def test_without_gradients_every_backend_gives_the_loss() -> None:
    inputs = inputs_of(torch.float32, train_head=False)
    expected = naive(**inputs)[0].detach()
    with torch.no_grad():
        loss, _ = answer_loss(**inputs)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("strange", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_shows_in_the_loss(strange: float, backend: str) -> None:
    inputs = inputs_of(torch.float32, ignored=0.0, train_head=False)
    inputs["hidden"] = torch.full_like(inputs["hidden"], strange)
    assert answer_loss(**inputs)[0].isnan(), backend


@pytest.mark.parametrize(
    ("labels", "choice_ids", "loss"),
    [
        ([3, 29, -100], (), "vocab"),
        ([3, 4096, -100], (), "vocab"),
        ([3, -1, -100], (), "vocab"),
        ([5, 3, -100], (5, 2), "choice"),
        ([2, -1, -100], (5, 2), "choice"),
    ],
)
@pytest.mark.parametrize("module", ["rellax.reference.answer", "rellax.kernels.answer"])
def test_a_label_that_no_check_reads_makes_loss_and_gradients_nan(
    module: str, labels: list[int], choice_ids: tuple[int, ...], loss: str
) -> None:
    """As on a GPU, which no check waits for: nothing is trained on an answer that is none."""
    inputs = inputs_of(torch.float32, n=3)
    rows = (inputs["hidden"], inputs["lm_head_weight"], None, inputs["positions"])
    options = (torch.ones((), device=rows[0].device), choice_ids, loss, None, [True, True, False])
    forward = importlib.import_module(module).answer_fwd
    with torch.no_grad():
        value, _, dhidden, dweight, _ = forward(*rows, rows[-1].new_tensor(labels), *options)
    assert value.isnan()
    assert dhidden[1].isnan().all()
    assert dhidden[[0, 2]].isfinite().all()
    assert dweight.isnan().any()


@pytest.mark.parametrize("loss", ["vocab", "choice"])
@pytest.mark.parametrize("name", ["hidden", "lm_head_weight", "bias"])
def test_no_second_derivative_is_made_up(name: str, loss: str) -> None:
    inputs = inputs_of(torch.float32, bias=True, choice_ids=(5, 2), loss=loss)
    value, _ = answer_loss(**inputs)
    (gradient,) = torch.autograd.grad(value.square(), inputs[name], create_graph=True)
    with pytest.raises(RuntimeError, match=r"backward|autograd|derivative"):
        torch.autograd.grad(gradient.square().sum(), inputs[name])


@pytest.mark.parametrize("case", ["vocab", "softcap", "choice-softcap-bias", "vocab-and-choice-logits"])
def test_gradients_in_fp64(case: str) -> None:
    inputs = inputs_of(torch.float64, **ANSWER[case])
    names = [name for name in ("hidden", "lm_head_weight", "bias") if inputs[name] is not None]

    def function(*tensors: Tensor) -> Tensor:
        return answer_loss(**{**inputs, **dict(zip(names, tensors, strict=True))})[0]

    assert torch.autograd.gradcheck(function, [inputs[name] for name in names], fast_mode=True)


def test_a_bias_in_fp64_widens_nothing(backend: str) -> None:
    inputs = inputs_of(torch.float32, bias=True, train_head=False)
    expected = answer_loss(**inputs)[0]
    loss, logits = answer_loss(**inputs | {"bias": inputs["bias"].double()})
    assert loss.dtype == logits.dtype == torch.float32, backend
    torch.testing.assert_close(loss, expected)


def test_a_head_in_fp64_widens_all(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(torch.float32, train_head=False)
    inputs["lm_head_weight"] = inputs["lm_head_weight"].double()
    loss, logits = answer_loss(**inputs)
    assert loss.dtype == logits.dtype == torch.float64
    torch.testing.assert_close(loss, naive(**inputs | {"hidden": inputs["hidden"].double()})[0])
    assert torch.autograd.grad(loss, inputs["hidden"])[0].dtype == torch.float32
    monkeypatch.setenv("RELLAX_BACKEND", "triton")
    with pytest.raises(InputError, match=r"RELLAX_BACKEND=triton: .* does not take torch\.float64"):
        answer_loss(**inputs)


def test_choice_loss_is_binary_cross_entropy() -> None:
    inputs = inputs_of(torch.float64, choice_ids=(5, 2), ignored=0.0)
    loss, logits = answer_loss(**inputs)
    yes = (inputs["labels"] == 2).double()
    torch.testing.assert_close(
        loss, F.binary_cross_entropy_with_logits(logits[:, 1] - logits[:, 0], yes), check_dtype=False
    )


def test_vocabulary_and_rows_in_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(torch.float64, **ANSWER["many-rows"], bias=True)
    leaves = [inputs["hidden"], inputs["lm_head_weight"], inputs["bias"]]
    whole = answer_loss(**inputs)[0]
    monkeypatch.setattr(reference, "_LOGITS", 100)
    monkeypatch.setattr(reference, "_WIDENED", 100)
    blocks = answer_loss(**inputs)[0]
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(torch.autograd.grad(blocks, leaves), torch.autograd.grad(whole, leaves))


def test_nothing_of_the_vocabularys_size_is_saved() -> None:
    inputs = inputs_of(torch.float32, **ANSWER["many-rows"], train_head=False)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda x: x):
        answer_loss(**inputs)
    assert {tuple(tensor.shape) for tensor in saved if tensor.numel()} == {(129, 7), (129,)}


@pytest.mark.parametrize("options", [{}, {"choice_ids": (5, 2)}])
def test_ignored_rows_touch_nothing(options: dict[str, tuple[int, int]]) -> None:
    """Not even where their hidden states are not finite, as those of padding may be."""
    inputs = inputs_of(torch.float32, **options)
    ignored = inputs["labels"] == -100
    assert ignored.any()
    hidden = inputs["hidden"].detach().clone()
    hidden.view(-1, 9)[inputs["positions"][ignored]] = torch.nan
    hidden.requires_grad_()
    loss, _ = answer_loss(**{**inputs, "hidden": hidden})
    expected, _ = answer_loss(**inputs)
    assert torch.equal(loss, expected)
    for gradient in torch.autograd.grad(loss, [hidden, inputs["lm_head_weight"]]):
        assert gradient.isfinite().all()


def test_without_labels_the_loss_is_zero() -> None:
    inputs = inputs_of(torch.float32, ignored=1.0)
    loss, _ = answer_loss(**inputs)
    gradients = torch.autograd.grad(loss, [inputs["hidden"], inputs["lm_head_weight"]])
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in gradients)


def test_a_position_asked_again_counts_again() -> None:
    inputs = inputs_of(torch.float64, n=2, ignored=0.0)
    once, _ = answer_loss(**{**inputs, "denominator": 1})
    again = {name: inputs[name][[0, 1, 0, 1, 0, 1]] for name in ("positions", "labels")}
    loss, _ = answer_loss(**{**inputs, **again, "denominator": 1})
    expected, actual = (torch.autograd.grad(value, inputs["hidden"])[0] for value in (3 * once, loss))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("denominator", [4, 4.0, torch.tensor(4), torch.tensor(4.0)])
def test_denominator_divides_the_sum(denominator: float | Tensor) -> None:
    inputs = inputs_of(torch.float32)
    supervised = (inputs["labels"] != -100).sum()
    expected = answer_loss(**inputs)[0] * supervised / 4
    torch.testing.assert_close(answer_loss(**{**inputs, "denominator": denominator})[0], expected)


def test_logits_of_bf16_states_are_not_rounded_to_bf16() -> None:
    inputs = inputs_of(torch.bfloat16, choice_ids=(5, 2))
    rows = inputs["hidden"].flatten(0, 1)[inputs["positions"]].double()
    exact = rows @ inputs["lm_head_weight"][[5, 2]].double().T
    torch.testing.assert_close(answer_loss(**inputs)[1].double(), exact, rtol=1e-5, atol=1e-6)


def test_no_grad_gives_the_same_loss() -> None:
    inputs = inputs_of(torch.float32)
    with torch.no_grad():
        loss, _ = answer_loss(**inputs)
    assert not loss.requires_grad
    assert torch.equal(loss, answer_loss(**inputs)[0].detach())


def test_autocast_changes_nothing() -> None:
    inputs = inputs_of(torch.float32)
    expected = answer_loss(**inputs)[0]
    with torch.autocast(inputs["hidden"].device.type, torch.bfloat16):
        loss, _ = answer_loss(**inputs)
    assert torch.equal(loss, expected)


def test_same_bits_every_time() -> None:
    inputs = inputs_of(torch.float32, **ANSWER["many-rows"])
    runs = []
    for _ in range(2):
        loss, _ = answer_loss(**inputs)
        runs.append((loss, *torch.autograd.grad(loss, [inputs["hidden"], inputs["lm_head_weight"]])))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("case", ["many-rows", "choice-softcap-bias", "vocab-and-choice-logits"])
def test_nothing_waits_for_a_gpu(case: str) -> None:
    """Tensors without values raise where one is asked for, or where it would decide a shape."""
    with FakeTensorMode(), torch.no_grad():
        inputs = inputs_of(torch.float32, **ANSWER[case])
        names = ("hidden", "lm_head_weight", "bias", "positions", "labels")
        ids = inputs["choice_ids"] or ()
        options = (ids, inputs["loss"] or ("choice" if ids else "vocab"), inputs["softcap"], [True] * 3)
        tensors = [inputs[name] for name in names]
        total = torch.empty(())
        loss, _, dh, *_ = reference.answer_fwd(*tensors, total, *options)
        assert loss.shape == ()
        shape = [*inputs["hidden"].shape]
        assert list(reference.answer_bwd(loss, dh, inputs["positions"], shape, dh.dtype).shape) == shape


WRONG = {
    "hidden": torch.zeros(3, 7, 9, dtype=torch.int64),
    "lm_head_weight": torch.zeros(29, 8),
    "positions": torch.zeros(7),
    "labels": torch.zeros(6, dtype=torch.int64),
    "bias": torch.zeros(28),
    "choice_ids": (3, 3),
    "loss": "both",
    "softcap": 0.0,
    "denominator": 0,
    "denominator that is complex": torch.ones((), dtype=torch.complex64),
    "denominator that is infinite": torch.tensor(torch.inf),
    "choice_ids of bools": (False, True),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_argument(case: str) -> None:
    name, wrong = case.split()[0], WRONG[case]
    inputs = inputs_of(torch.float32)
    inputs[name] = wrong.to(inputs["positions"].device) if isinstance(wrong, Tensor) else wrong
    with pytest.raises(InputError, match=f"^{name}: expected "):
        answer_loss(**inputs)


@pytest.mark.parametrize("other", [lambda x: x.to("meta"), Tensor.to_sparse], ids=["device", "layout"])
@pytest.mark.parametrize("name", ["positions", "labels"])
def test_errors_name_the_argument_that_lies_elsewhere(name: str, other: Callable[[Tensor], Tensor]) -> None:
    inputs = inputs_of(torch.float32)
    inputs[name] = other(inputs[name])
    with pytest.raises(InputError, match=f"^{name}: expected "):
        answer_loss(**inputs)


def test_fp8_is_no_dtype_to_compute_with() -> None:
    inputs = inputs_of(torch.float32)
    inputs["hidden"] = inputs["hidden"].detach().to(torch.float8_e4m3fn)
    with pytest.raises(InputError, match=r"^hidden: expected floating .*, got .*, float8_e4m3fn, on "):
        answer_loss(**inputs)


@pytest.mark.parametrize(
    ("name", "wrong", "options"),
    [
        ("positions", 21, {}),
        ("positions", -1, {}),
        ("labels", 29, {}),
        ("labels", -1, {}),
        ("labels", 3, {"choice_ids": (5, 2)}),
    ],
)
def test_errors_name_the_value_on_a_cpu(name: str, wrong: int, options: dict[str, tuple[int, int]]) -> None:
    inputs = inputs_of(torch.float32, **options)
    inputs = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in inputs.items()}
    inputs[name][0] = wrong
    with pytest.raises(InputError, match=f"^{name}: expected .*, got {wrong}"):
        answer_loss(**inputs)


def test_choice_needs_two_tokens() -> None:
    with pytest.raises(InputError, match=r"^choice_ids: expected the two answer tokens"):
        answer_loss(**{**inputs_of(torch.float32), "loss": "choice"})
