"""Checkpoints as the published ReLLaX saves them, made here with its modules' layout, and imported."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_patch import close, snapshot
from torch import nn

from rellax.errors import InputError
from rellax.patch import load_published, patch_model
from rellax.patch.forward import Handed

R, TARGETS = 3, ("q_proj", "v_proj")
LAYER = "base_model.model.model.layers.{}.self_attn.{}"


def checkpoint() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The state dicts of stage 2 and of stage 1."""
    torch.manual_seed(4)
    gates, lora = {}, {}
    for layer in range(2):
        for target, size in zip(TARGETS, (32, 16), strict=True):
            gate = nn.Sequential(
                nn.LayerNorm(tiny.COND),
                nn.Linear(tiny.COND, 2 * R * R),
                nn.GELU(),
                nn.Linear(2 * R * R, R * R),
            )
            name = LAYER.format(layer, target)
            gates |= {f"LM.{name}.lora_gate.{part}": t for part, t in gate.state_dict().items()}
            lora[f"{name}.lora_A.weight"] = torch.randn(R, 32)
            lora[f"{name}.lora_B.weight"] = torch.randn(size, R)
    projector = nn.Sequential(nn.Linear(tiny.ITEM_SIZE, 32), nn.GELU(), nn.Linear(32, 32))
    gates |= {f"ctr_input_embedding_prj.{part}": t for part, t in projector.state_dict().items()}
    assert all(f"LM.{LAYER.format(1, 'v_proj')}.lora_gate.{n}.bias" in gates for n in (0, 1, 3))
    return {k: t + 0.3 * torch.randn_like(t) for k, t in gates.items()}, lora


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "gates").mkdir()
    (tmp_path / "lora").mkdir()
    paths = tmp_path / "gates" / "pytorch_model.bin", tmp_path / "lora" / "pytorch_model.bin"
    for path, tensors in zip(paths, checkpoint(), strict=True):
        torch.save(tensors, path)
    return paths


def patched(*, soft_prompt: bool = True, **options: Any) -> Any:
    config = tiny.config(**{"r": R, "alpha": 2 * R, "target_modules": TARGETS} | options)
    return patch_model(
        tiny.base_model(), config, soft_prompt=tiny.soft_prompt_config() if soft_prompt else None
    )


def test_layers_are_those_of_the_published_code(files: tuple[Path, Path]) -> None:
    """One layer after the other, as its forward pass has it: x A, the gate, B, and the scale."""
    model = load_published(patched(), files[0], lora=files[1])
    gates, lora = ({name: t.double() for name, t in part.items()} for part in checkpoint())
    u, x = torch.randn(4, tiny.COND).double(), torch.randn(4, 6, 32).double()
    bank = model.rellax.gate_bank(u)
    for index, (layer, target) in enumerate((i, t) for i in range(2) for t in TARGETS):
        name = LAYER.format(layer, target)
        part = {
            n: [gates[f"LM.{name}.lora_gate.{n}.{kind}"] for kind in ("weight", "bias")] for n in (0, 1, 3)
        }
        hidden = F.gelu(F.linear(F.layer_norm(u, u.shape[1:], *part[0]), *part[1]))
        gate = F.linear(hidden, *part[3]).reshape(-1, R, R)
        close(bank[index], gate)
        a, b = (lora[f"{name}.lora_{ab}.weight"] for ab in "AB")
        linear = model.get_submodule(f"model.layers.{layer}.self_attn.{target}")
        linear.receive(Handed(bank[index]))
        close(linear(x), F.linear(x, linear.weight) + F.linear(torch.bmm(F.linear(x, a), gate), b) * 2)
    close(soft_row(model), published_row(gates))


def soft_row(model: Any) -> torch.Tensor:
    return model.rellax.soft_prompt.projector(model.rellax.soft_prompt.item_embeddings)


def published_row(gates: dict[str, torch.Tensor]) -> torch.Tensor:
    part = {n: [gates[f"ctr_input_embedding_prj.{n}.{kind}"] for kind in ("weight", "bias")] for n in (0, 2)}
    return F.linear(F.gelu(F.linear(tiny.soft_prompt_config().item_embeddings, *part[0])), *part[2])


def test_other_ways_to_hold_it(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Both stages in one file, under a wrapper's names, as safetensors; and stage 1 loaded by other means."""
    gates, lora = checkpoint()
    whole = {f"_orig_mod.{name}": t for name, t in gates.items()}
    whole |= {f"_orig_mod.LM.{name.replace('.weight', '.default.weight')}": t for name, t in lora.items()}
    save_file(whole, tmp_path / "whole.safetensors")
    one = load_published(patched(), tmp_path / "whole.safetensors")
    other = load_published(patched(), files[0], lora=files[1])
    arguments = tiny.batch(tiny.instances())
    assert torch.equal(one(**arguments).loss, other(**arguments).loss)
    third = patched()
    with torch.no_grad():
        for name, projection in third.rellax.projections.items():
            projection.lora_a.copy_(other.rellax.projections[name].lora_a)
            projection.lora_b.copy_(other.rellax.projections[name].lora_b)
    assert torch.equal(load_published(third, files[0])(**arguments).loss, other(**arguments).loss)


def _edit(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = torch.load(path, weights_only=True)
        change(tensors)
        torch.save(tensors, path)

    return edit


GATE = f"LM.{LAYER.format(0, 'q_proj')}.lora_gate"


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (
            patched,
            _edit(lambda t: t.pop(f"{GATE}.3.bias")),
            "expected model.layers.0.*lora_gate.3.bias, it lacks",
        ),
        (
            patched,
            _edit(lambda t: t.update({f"{GATE}.4.bias": torch.ones(1)})),
            "expected no LM.*lora_gate.4.bias",
        ),
        (patched, _edit(lambda t: t.clear()), "expected tensors named lora_gate.N, got none"),
        (
            patched,
            _edit(lambda t: t[f"{GATE}.3.bias"].fill_(math.nan)),
            "finite floating numbers as LM.*3.bias",
        ),
        (
            patched,
            _edit(lambda t: t.update({f"{GATE}.3.bias": torch.ones(9, dtype=torch.int64)})),
            r"finite floating numbers as LM.*3.bias, got others \(torch.int64\)",
        ),
        (lambda: patched(r=2), None, r"lora_A of shape \(2, 32\), got \(3, 32\)"),
        (lambda: patched(cond_dim=6), None, r"lora_gate.0.bias of shape \(6,\), got \(5,\)"),
        (lambda: patched(target_modules=["q_proj"]), None, "expected no model.layers.0.self_attn.v_proj"),
        (lambda: patched(soft_prompt=False), None, "expected no ctr_input_embedding_prj.0.bias"),
        (lambda: patched(interaction="diagonal"), None, "expected interaction 'full', got 'diagonal'"),
        (lambda: patched(interaction="none"), None, "patched with interaction"),
        (tiny.base_model, None, "patched with interaction"),
        (
            patched,
            lambda path: path.write_bytes(path.read_bytes()[:500]),
            "expected a file of nothing but tensors",
        ),
        (
            patched,
            lambda path: torch.save({"x": Path("code")}, path),
            "expected a file of nothing but tensors",
        ),
        (patched, lambda path: torch.save([1], path), "expected a dictionary of tensors, got list"),
        (patched, lambda path: path.unlink(), "expected a file of tensors, found none"),
    ],
)
def test_checkpoints_that_do_not_fit(
    files: tuple[Path, Path], make: Callable[[], Any], change: Callable[[Path], None] | None, message: str
) -> None:
    if change is not None:
        change(files[0])
    model = make()
    before, values = snapshot(model), {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        load_published(model, files[0], lora=files[1])
    assert snapshot(model) == before
    assert all(torch.equal(t, values[name]) for name, t in model.state_dict().items())
