"""What a patched model holds beside its own modules: `model.rellax`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rellax.errors import InputError
from rellax.nn import AnswerHead, GateBank, SoftPrompt
from rellax.patch.config import CFLoRAConfig


@dataclass(frozen=True)
class Report:
    """What patching did: `patched` and `skipped` (with the reason) name linear layers of the decoder.

    Those in one set of `shared_inputs` read the same tensor and run as one operator. `quantised` says to what
    the weights of patched layers are, where they are.
    """

    model: str
    patched: tuple[str, ...]
    skipped: Mapping[str, str]
    shared_inputs: tuple[tuple[str, ...], ...]
    quantised: Mapping[str, str]
    lora_parameters: int
    gate_parameters: int
    soft_prompt_parameters: int
    base_parameters: int

    def __str__(self) -> str:
        parts = (self.lora_parameters, self.gate_parameters, self.soft_prompt_parameters)
        lora, gates, soft_prompt = (f"{part:,}" for part in parts)
        lines = [
            f"{self.model}: {len(self.patched)} linear layers patched, {len(self.skipped)} skipped",
            f"{sum(parts):,} new parameters (LoRA {lora}, gates {gates}, soft prompt {soft_prompt}) "
            f"beside {self.base_parameters:,} frozen ones",
        ]
        quantised = {name: f": {kind}" for name, kind in self.quantised.items()}
        rows = [("patched", name, quantised.get(name, "")) for name in self.patched]
        rows += [("skipped", name, f": {reason}") for name, reason in self.skipped.items()]
        for first, *others in self.shared_inputs:
            rows.append(("sharing", first, " and " + ", ".join(name.rsplit(".", 1)[-1] for name in others)))
        counts = Counter((word, re.sub(r"\.\d+\.", ".*.", name), reason) for word, name, reason in rows)
        return "\n".join(
            lines + [f"  {word} {n} x {name}{reason}" for (word, name, reason), n in counts.items()]
        )


class RellaxState(nn.Module):
    """The new modules of a patched model, its configuration and report, and what unpatching needs.

    The adapted layers are the model's own submodules, so here they are plain values of a dict.
    """

    report: Report
    gate_bank: GateBank | None
    soft_prompt: SoftPrompt | None

    def __init__(
        self,
        config: CFLoRAConfig,
        projections: Mapping[str, Any],
        gate_bank: GateBank | None,
        soft_prompt: SoftPrompt | None,
        answer_head: AnswerHead,
        original_requires_grad: Mapping[str, bool],
        base_weights: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.config = config
        self.gate_bank = gate_bank
        self.soft_prompt = soft_prompt
        self.answer_head = answer_head
        self.projections = dict(projections)
        self.original_requires_grad = dict(original_requires_grad)
        self.base_weights = dict(base_weights)  # their `identity`
        self.compiled: Sequence[nn.Module] = ()  # of the model's own modules

    def active_bank(self) -> GateBank | None:
        """The gate bank that a call of the model takes its gates from."""
        return self.gate_bank

    def set_trainable(
        self, *, lora: bool | None = None, gates: bool | None = None, soft_prompt: bool | None = None
    ) -> None:
        """Choose what is trained: A and B, the gate bank, the soft prompt's projector; None: as it is.

        Raises:
            InputError: a part is to be trained that the model does not have.
        """
        if lora is not None:
            for projection in self.projections.values():
                projection.lora_a.requires_grad_(lora)
                projection.lora_b.requires_grad_(lora)
        for name, part, wanted in (
            ("gates", self.active_bank(), gates),
            ("soft_prompt", self.soft_prompt, soft_prompt),
        ):
            if part is not None and wanted is not None:
                part.requires_grad_(wanted)
            elif wanted:
                raise InputError(f"{name}: expected False, the model was patched without")
