"""What a run and a comparison are: dataclasses, checked once. Nothing heavy is imported here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rellax._files import located, read_json
from rellax.errors import InputError

DATASETS = ("ml-100k", "ml-1m", "ml-25m", "bookcrossing")
STAGES = ("1", "2", "joint")
PROMPTS = ("recent", "retrieved", "mixture")
PACKING = ("auto", "always", "never")
SCHEDULES = ("linear", "cosine", "constant")
QUANTIZE = ("none", "int8", "nf4", "fp4", "int8wo", "int8dq", "int4wo", "float8wo")
INTERACTIONS = ("none", "diagonal", "full")
CRM_MODELS = ("DIN", "SIM", "ETA", "SDIM", "DCNv2", "DeepFM")
KINDS = {  # names that the configurations of all runs of a command have had, and those of nothing else
    "crm": {"model", "embedding_dim", "hidden"},
    "embed": {"data", "model", "dim"},
    "retrieve": {"data", "embeddings", "k"},
    "train": {"data", "model", "stage", "prompts"},
}
CRM_SAMPLES = ("all", "held-out", "shots")
SIMILARITIES = ("text", "text+crm")
LEARNING_RATES = {"1": 1e-3, "2": 3e-4, "joint": 1e-3}
CHOICES = {  # what fields of `TrainConfig` may be
    "stage": STAGES,
    "prompts": PROMPTS,
    "interaction": INTERACTIONS,
    "gate_init": ("identity", "kaiming"),
    "loss": ("choice", "vocab"),
    "select": ("auc", "log_loss"),
    "packing": PACKING,
    "schedule": SCHEDULES,
    "dtype": ("auto", "float32", "bfloat16"),
    "quantize": QUANTIZE,
}


@dataclass(frozen=True)
class TrainConfig:
    """A training run of the language model.

    Folders:
        data: of `rellax prepare`.
        model: a Hugging Face model.
        crm: of `rellax crm`; None where neither gates nor soft prompts are used.
        retrieved: of `rellax retrieve`; None where all prompts are recent ones.
        start: run folder of the stage-1 adapter that stage 2 begins with, or a folder of LoRA saved by PEFT.

    What is trained:
        stage: "1" (A and B, no gates, no soft prompt), "2" (A and B frozen, gates and soft-prompt projector
            trained) or "joint" (everything from scratch).
        interaction: of the LoRA components, "none", "diagonal" or "full".
        gate_init: "identity" (gates begin as none, so stage 2 begins with the stage-1 model) or "kaiming", as
            published.
        soft_prompt: a soft prompt after each behaviour and after the target.
        crm_logit: the answer's log-odds begin at those of the CRM, so that what is learnt is what it lacks.
            The CRM should not have been trained on the shots: `rellax crm --hold-out`.
        r, alpha, dropout, target_modules: of LoRA; stage 2 takes them over from `start`, and crm_logit.

    Prompts:
        prompts: "recent" (the K last behaviours), "retrieved" (the K nearest to the target) or "mixture"
            (trained on each sample once with either, evaluated on retrieved prompts).
        recent_share: of a retrieved prompt's K behaviours so many are the most recent ones, rounded down; the
            others are the nearest of the rest.
        k, max_tokens: behaviours and tokens in a prompt, at most.
        shots: random samples of the training split; None takes all.

    Optimisation:
        lr: peak learning rate; None takes the stage's own.
        soft_prompt_lr: that of the soft-prompt projector; None is `lr`.
        schedule: of the rate after its rise: "linear" or "cosine" (both end at zero), or "constant".
        warmup: fraction of all steps over which the rate rises.
        weight_decay: of AdamW, on all that is trained but biases and norms.
        clip: largest norm of the gradient.
        loss: "choice" (the two answers) or "vocab" (all tokens).
        validation_samples: random samples of the validation split, at most; None takes all.
        validate_every: steps between two validations; None validates after each epoch.
        eval_batch_size: prompts that are scored at once; None is 16, on a GPU 64. It changes rounding alone.
        select: the validation metric that chooses the step whose adapter is kept, "auc" or "log_loss".
        patience: validations without a better one after which the run ends; None goes through all epochs.
        checkpoint_every: steps between two checkpoints.
        gradient_checkpointing: compute each layer again in the backward pass, so that a third more time pays
            for not keeping its activations. It changes nothing else.
        compile: compile the frozen model's norms and MLPs: less time and memory for each step, half a minute
            more before the first. It changes rounding alone.
        packing: whether the prompts of a batch follow one another instead of being padded: "always", "never",
            or "auto", where the machine's attention is then no slower. It changes rounding alone.
        dtype: of the frozen weights; "auto" is bfloat16 where the processor has it, else float32. What is
            trained, and its optimiser state, are float32.
        quantize: what the frozen linear layers are quantised to; by bitsandbytes "int8" (LLM.int8), "nf4" or
            "fp4"; by torchao "int8wo", "int4wo", "float8wo" (weights alone) or "int8dq" (activations too).
    """

    data: str
    model: str
    crm: str | None = None
    retrieved: str | None = None
    start: str | None = None

    stage: str = "1"
    interaction: str = "none"
    gate_init: str = "identity"
    soft_prompt: bool = False
    crm_logit: bool = False
    r: int = 8
    alpha: float = 16
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")

    prompts: str = "mixture"
    recent_share: float = 0.0
    k: int = 10
    max_tokens: int = 1024
    shots: int | None = None

    epochs: int = 1
    lr: float | None = None
    soft_prompt_lr: float | None = None
    batch_size: int = 16
    micro_batch_size: int = 8
    eval_batch_size: int | None = None
    schedule: str = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    loss: str = "choice"
    validation_samples: int | None = 500
    validate_every: int | None = None
    select: str = "auc"
    patience: int | None = None
    checkpoint_every: int = 20
    gradient_checkpointing: bool = False
    compile: bool = False
    packing: str = "auto"
    dtype: str = "auto"
    quantize: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_values()
        self._check_stage()
        if self.prompts != "recent" and self.retrieved is None:
            raise InputError(
                f"retrieved: prompts={self.prompts!r} needs the folder of `rellax retrieve`, got None"
            )
        if self.recent_share and self.prompts == "recent":
            raise InputError(f"recent_share: expected 0 with prompts='recent', got {self.recent_share!r}")
        if self.uses_crm and self.crm is None:
            raise InputError(
                "crm: gates, soft prompts and crm_logit need the folder of `rellax crm`, got None"
            )
        if self.crm_logit and self.loss != "choice":
            raise InputError(f"loss: expected 'choice' with crm_logit, got {self.loss!r}")

    @property
    def peak_lr(self) -> float:
        return LEARNING_RATES[self.stage] if self.lr is None else self.lr

    @property
    def uses_crm(self) -> bool:
        return self._is_conditional or self.crm_logit

    @property
    def _is_conditional(self) -> bool:
        return self.soft_prompt or self.interaction != "none"

    @property
    def recent_behaviours(self) -> int:
        """How many of a retrieved prompt's K behaviours are the most recent ones."""
        return recent_behaviours(self.recent_share, self.k)

    @property
    def evaluation_prompts(self) -> str:
        return "recent" if self.prompts == "recent" else "retrieved"

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**dataclasses.asdict(self), "target_modules": list(self.target_modules)}

    def _check_values(self) -> None:
        _check_finite(self)
        for name, allowed in CHOICES.items():
            _check_choice(name, getattr(self, name), allowed)
        sizes = ("k", "max_tokens", "epochs", "batch_size", "micro_batch_size", "checkpoint_every", "r")
        for name in (*sizes, "clip"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        optional = ("shots", "validation_samples", "validate_every", "eval_batch_size", "patience")
        for name in (*optional, "lr", "soft_prompt_lr"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"{name}: expected a positive number or None, got {value!r}")
        for name in ("warmup", "dropout", "recent_share"):
            _check_fraction(name, getattr(self, name))
        if self.weight_decay < 0:
            raise InputError(f"weight_decay: expected zero or more, got {self.weight_decay!r}")
        if self.soft_prompt_lr is not None and not self.soft_prompt:
            raise InputError(
                f"soft_prompt_lr: expected None without soft_prompt, got {self.soft_prompt_lr!r}"
            )

    def _check_stage(self) -> None:
        if self.stage == "1" and self._is_conditional:
            raise InputError(
                "stage: stage 1 trains plain LoRA, expected interaction='none' and no soft prompt, "
                f"got interaction={self.interaction!r}, soft_prompt={self.soft_prompt}"
            )
        if self.stage != "1" and not self._is_conditional:
            raise InputError(
                f"stage: stage {self.stage} trains gates or the soft-prompt projector, "
                "expected an interaction, a soft prompt or both, got neither"
            )
        if self.stage == "2" and self.start is None:
            raise InputError(
                "start: stage 2 needs the run folder of a stage-1 adapter, got None; without one B is zero "
                "and frozen, so the gates would get no gradient"
            )
        if self.stage != "2" and self.start is not None:
            raise InputError(
                f"start: only stage 2 begins with another run's adapter, got stage {self.stage!r}"
            )


@dataclass(frozen=True)
class CRMConfig:
    """How a CRM is built and trained.

    Attributes:
        model: one of FuxiCTR's long-sequence models, DIN, SIM, ETA or SDIM, or one that averages the
            behaviours, DCNv2 or DeepFM.
        shots: random samples of the training split to train on; None takes all.
        hold_out: as many random training samples are not trained on, namely those that `rellax train` takes
            for this number of shots and this seed. What the model says of them is then as good as what it
            says of new samples, which is what gates meet later.
        max_len: most recent behaviours the model reads.
        user_id: whether the user's id is a feature. Under a split by time most users of the later splits are
            new, and the model is better off without a feature that says nothing about them.
        embedding_dim: of every feature.
        hidden: widths of the final MLP; an instance embedding is the last one and two constants.
        dropout: in the final MLP.
        regularizer: weight of the L2 norm of the embeddings.
        epochs, patience: training ends after `epochs`, or once the AUC on the validation split, taken twice
            an epoch, has not beaten its best `patience` times; the best state is kept.
        batch_size: None takes a 32nd of the training samples, but from 64 to 1024.
    """

    model: str = "DIN"
    shots: int | None = None
    hold_out: int | None = None
    seed: int = 0
    max_len: int = 30
    user_id: bool = False
    embedding_dim: int = 16
    hidden: tuple[int, ...] = (256, 128, 64)
    dropout: float = 0.2
    regularizer: float = 1e-5
    epochs: int = 10
    patience: int = 4
    lr: float = 1e-3
    batch_size: int | None = None

    def __post_init__(self) -> None:
        _check_finite(self)
        _check_choice("model", self.model, CRM_MODELS)
        _check_fraction("dropout", self.dropout)
        for name in ("embedding_dim", "epochs", "patience", "lr"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"batch_size: expected a positive number or None, got {self.batch_size}")
        if self.regularizer < 0:
            raise InputError(f"regularizer: expected zero or more, got {self.regularizer}")
        if not self.hidden or min(self.hidden) < 1:
            widths = ", ".join(map(str, self.hidden)) or "none"
            raise InputError(f"hidden: expected at least one width, all of them positive, got {widths}")
        if self.shots is not None and self.hold_out is not None:
            raise InputError("hold_out: expected it without shots, which would be the same samples, got both")
        if self.max_len < 4:
            raise InputError(f"max_len: expected at least 4 behaviours, got {self.max_len}")


@dataclass(frozen=True)
class Comparison:
    """What all runs of a comparison share.

    Attributes:
        model: the language model; None is SmolLM2-135M-Instruct.
        raw: folder with MovieLens-100K; None is the embedded one.
        test_samples, validation_samples: random samples of these splits; None takes all.
        batch_size: prompts in a step.
        micro_batch_size: prompts at once, at most.
        eval_batch_size: prompts that are scored at once; None is 16, on a GPU 64.
        epochs, lr: of stage 1.
        epochs2, lr2: of stage 2. The published rate, 3e-4, is for some thousand steps; for the few of these
            sizes 1e-2 and 2e-2 are better than 5e-3 for gates alone, and 2e-2 is worse with soft prompts
            (docs/results/notes.md).
        soft_prompt_lr: of the soft-prompt projector; None is `lr2`.
        crm_epochs: of the classical models, at most.
        similarity: what behaviours are retrieved by: "text", the embeddings of the items' texts, or
            "text+crm", these and the item embeddings of a classical model.
        recent_share: of retrieved prompts, see `TrainConfig`.
    """

    model: str | None = None
    raw: str | None = None
    test_samples: int | None = 400
    validation_samples: int | None = 100
    batch_size: int = 8
    micro_batch_size: int = 8
    eval_batch_size: int | None = None
    epochs: int = 1
    lr: float = 1e-3
    epochs2: int = 1
    lr2: float = 5e-3
    soft_prompt_lr: float | None = None
    crm_epochs: int = 10
    similarity: str = "text"
    recent_share: float = 0.0

    def __post_init__(self) -> None:
        _check_finite(self)
        _check_choice("similarity", self.similarity, SIMILARITIES)
        _check_fraction("recent_share", self.recent_share)


@dataclass(frozen=True)
class DemoConfig(Comparison):
    """Sizes of the demo.

    Attributes:
        shots: training samples of the language model, and of the classical models' few-shot variants.
        k: behaviours in a prompt.
        few_shot_crm: retrieval, gates and soft prompts read the DIN trained on the same shots, not on all
            samples.
        seed: of everything random.
    """

    shots: int = 256
    k: int = 5
    similarity: str = "text+crm"
    recent_share: float = 0.4
    few_shot_crm: bool = False
    seed: int = 0


@dataclass(frozen=True)
class StudyConfig(Comparison):
    """A grid of runs: every method at every K, number of shots and seed, beside the classical models.

    Attributes:
        data: folder of `rellax prepare`; None prepares MovieLens-100K.
        methods: names in `rellax.ctr.methods.METHODS`; what one builds on runs as well.
        crms: classical models, each on the same shots and on all training samples.
        k, shots, seeds: the axes of the grid.
        crm: the classical model that gates and soft prompts read.
        crm_samples: what that one is trained on: "all" training samples, "held-out" all but the language
            model's shots, or "shots" these alone.
        similarity: with "text+crm" the classical model is `crm` trained on all training samples.
    """

    test_samples: int | None = 1000
    validation_samples: int | None = 300
    batch_size: int = 16
    data: str | None = None
    methods: tuple[str, ...] = (
        "share-recent",
        "share-retrieved",
        "zero-shot-recent",
        "zero-shot-retrieved",
        "lora-recent",
        "lora-retrieved",
        "rella",
        "lora-boosted",
        "rella-spa",
        "rella-cflora-diagonal",
        "rella-cflora",
        "rellax",
        "rellax-boosted",
    )
    crms: tuple[str, ...] = ("DIN", "SIM", "ETA", "SDIM", "DeepFM", "DCNv2")
    k: tuple[int, ...] = (5, 10, 15, 20, 30)
    shots: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    seeds: tuple[int, ...] = (0, 1, 2)
    crm: str = "SIM"
    crm_samples: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("crm_samples", self.crm_samples, CRM_SAMPLES)
        for name, least in (("k", 1), ("shots", 1), ("seeds", 0)):
            values = getattr(self, name)
            if not values or min(values) < least or len(set(values)) != len(values):
                raise InputError(
                    f"{name}: expected distinct numbers of at least {least}, got "
                    f"{', '.join(map(str, values)) or 'none'}"
                )


def recent_behaviours(share: float, k: int) -> int:
    """How many of the `k` behaviours of a retrieved prompt are the most recent ones."""
    return int(share * k)


PATHS = ("data", "model", "retrieved", "crm", "start")
"""What of a run's configuration may have been moved together with it."""


def read_config(run: str | Path) -> TrainConfig:
    """The configuration of a finished training run; what an earlier version did not know is as by default.

    Its paths lead to where things are now, if they have been moved or copied together with the run.

    Raises:
        InputError: there is none, one of another kind of run or of a later version, or the run is not
            finished.
    """
    path = Path(run) / "config.json"
    values = read_json(path, maker="rellax train")
    if not isinstance(values, dict) or not KINDS["train"] <= values.keys():
        raise InputError(f"{path}: expected the configuration of `rellax train`, found another")
    values.pop("inputs", None)
    if unknown := values.keys() - {field.name for field in dataclasses.fields(TrainConfig)}:
        raise InputError(
            f"{path}: expected a run of this version of rellax or an earlier one, "
            f"found the unknown {', '.join(sorted(unknown))}"
        )
    if not (Path(run) / "metrics.json").exists():
        raise InputError(
            f"{run}: expected a finished run, found one that was stopped; its command finishes it"
        )
    modules = values.get("target_modules", TrainConfig.target_modules)
    values |= {name: located(run, values[name]) for name in PATHS if values.get(name) is not None}
    return TrainConfig(**values | {"target_modules": tuple(modules)})


INHERITED = ("r", "alpha", "dropout", "target_modules")
"""What a run takes from that which it starts from."""


def inherited(config: TrainConfig) -> TrainConfig:
    """`config` with the LoRA of the run, or of PEFT's folder, that it starts from.

    Raises:
        InputError: that run is not finished, not of stage 1, of another model or boosted from another CRM;
            PEFT's is not plain LoRA.
    """
    if config.start is None:
        return config
    if (Path(config.start) / "adapter_config.json").is_file():
        from rellax.patch import peft_files

        values, _ = peft_files.read(config.start)
        return dataclasses.replace(config, **values)
    first = read_config(config.start)
    if first.stage != "1":
        raise InputError(
            f"start: expected a run of stage 1, found one of stage {first.stage} in {config.start}"
        )
    if first.model != config.model:
        raise InputError(f"start: expected an adapter of {config.model}, found one of {first.model}")
    if first.crm_logit and _resolved(first.crm) != _resolved(config.crm):
        raise InputError(f"crm: expected {first.crm}, which {config.start} is boosted from, got {config.crm}")
    lora = {name: getattr(first, name) for name in INHERITED}
    return dataclasses.replace(config, **lora, crm_logit=config.crm_logit or first.crm_logit)


def _resolved(folder: str | None) -> Path | None:
    return None if folder is None else Path(folder).resolve()


def _check_finite(config: Any) -> None:
    """NaN is not below any bound that a field may have."""
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name}: expected a finite number, got {value!r}")


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise InputError(f"{name}: expected a fraction in [0, 1), got {value!r}")
