"""The methods that a comparison has, from the untrained model to ReLLaX, as training options."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rellax.errors import InputError


@dataclass(frozen=True)
class Method:
    """One way to use the language model, or what would be known without one.

    Attributes:
        title: for tables and legends.
        prompts: which behaviours it reads.
        stage: None is untrained; "2" continues from the run of `start`.
        start: the method whose adapter it begins with.
        options: fields of `TrainConfig` that make it what it is.
        crm_samples: what the classical model that it reads is trained on, where that is not a study's choice.
            It knows those samples better than new ones, so what is boosted from it takes others.
        is_model: whether a language model reads the behaviours, or their ratings alone are counted.
    """

    title: str
    prompts: str
    stage: str | None = None
    start: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    crm_samples: str | None = None
    is_model: bool = True

    @property
    def reads_crm(self) -> bool:
        return self.stage == "2" or self.crm_samples is not None


def _on_rella(title: str, crm_samples: str | None = None, **options: Any) -> Method:
    return Method(title, "retrieved", "2", "rella", options, crm_samples)


METHODS = {
    "share-recent": Method("Share of liked among the K most recent, no model", "recent", is_model=False),
    "share-retrieved": Method("Share of liked among the K retrieved, no model", "retrieved", is_model=False),
    "zero-shot-recent": Method("Zero-shot LLM, K most recent", "recent"),
    "zero-shot-retrieved": Method("Zero-shot LLM, K retrieved (SUBR)", "retrieved"),
    "lora-recent": Method("LoRA on recent prompts", "recent", "1"),
    "lora-retrieved": Method("LoRA on retrieved prompts", "retrieved", "1"),
    "rella": Method("LoRA on the mixture (ReLLa)", "mixture", "1"),
    "lora-boosted": Method(
        "LoRA on retrieved prompts, boosted from the classical model",
        "retrieved",
        "1",
        options={"crm_logit": True},
        crm_samples="held-out",
    ),
    "rella-spa": _on_rella("ReLLa + SPA", soft_prompt=True),
    "rella-cflora-diagonal": _on_rella("ReLLa + CFLoRA, diagonal", interaction="diagonal"),
    "rella-cflora": _on_rella("ReLLa + CFLoRA", interaction="full"),
    "rellax": _on_rella("ReLLa + SPA + CFLoRA (ReLLaX)", soft_prompt=True, interaction="full"),
    "rellax-boosted": _on_rella(
        "ReLLaX, boosted from the classical model",
        "held-out",
        soft_prompt=True,
        interaction="full",
        crm_logit=True,
    ),
}


def is_language_model(name: str) -> bool:
    """Whether a method has a language model, and so predicts the samples that it is asked for alone."""
    return name in METHODS and METHODS[name].is_model


def with_starts(names: Iterable[str]) -> list[str]:
    """The named methods and those that they begin with, in the order of `METHODS`.

    Raises:
        InputError: no such method.
    """
    wanted: set[str] = set()
    for name in names:
        if name not in METHODS:
            raise InputError(f"methods: expected some of {', '.join(METHODS)}, got {name!r}")
        wanted |= {name, METHODS[name].start or name}
    return [name for name in METHODS if name in wanted]
