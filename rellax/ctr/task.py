"""What a run works on: the data, its prompts, and the patched language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rellax._files import sha256_file
from rellax.ctr import crm
from rellax.ctr.batches import Collator, Example
from rellax.ctr.config import TrainConfig
from rellax.ctr.dataset import Dataset
from rellax.ctr.llm import checkpoint_activations, load_model, load_tokenizer
from rellax.ctr.prompts import PromptBuilder, add_placeholder, answer_ids, recent, with_recent
from rellax.ctr.retrieval import EMBEDDINGS, read_positions, retrieved_by
from rellax.errors import InputError
from rellax.patch import (
    CFLoRAConfig,
    SoftPromptConfig,
    load_adapter,
    packing_pays,
    patch_model,
    peft_files,
)
from rellax.patch.adapter import TENSOR_FILE, is_of_other_weights


@dataclass(frozen=True)
class Inputs:
    """The data of a run.

    Attributes:
        dataset: N items and S samples.
        retrieved: (S, k) positions in a sample's history by falling similarity to its target, then -1.
        item_embeddings: (N, E) float32, of the recommendation model.
        instance_embeddings: (S, d_u) float32, of the recommendation model.
        probabilities: (S,) float32, of Yes by the recommendation model.
    """

    dataset: Dataset
    retrieved: np.ndarray | None = None
    item_embeddings: Tensor | None = None
    instance_embeddings: Tensor | None = None
    probabilities: Tensor | None = None


def load_inputs(config: TrainConfig, *, progress: bool = False) -> Inputs:
    """Read the folders that `config` names.

    Raises:
        InputError: a file is missing, damaged, or was made from other data.
    """
    dataset = Dataset.load(config.data)
    retrieved = None
    if config.retrieved is not None:
        retrieved = read_positions(config.retrieved, dataset, config.k, progress=progress)
    if config.crm is None:
        return Inputs(dataset, retrieved)
    outputs = crm.load_crm(config.crm, dataset)
    known = (outputs.item_embeddings, outputs.instance_embeddings, outputs.probabilities)
    return Inputs(dataset, retrieved, *known)


def input_hashes(config: TrainConfig, *, progress: bool = False) -> dict[str, str]:
    """SHA-256 of each file that decides what a run of `config` computes, but the language model's.

    Of that the adapter knows the weights, wherever they come from; see `Task.check_weights`.

    Raises:
        InputError: a file is missing.
    """
    data = ("samples.parquet", "behaviours.parquet", "items.parquet", "users.parquet", "dataset.json")
    makers = {Path(config.data) / name: "prepare" for name in data}
    if config.retrieved is not None:
        makers[Path(config.retrieved) / "retrieved.parquet"] = "retrieve"
    if config.crm is not None:
        makers |= {Path(config.crm) / name: "crm" for name in (crm.WEIGHTS, crm.OUTPUTS)}
    if config.start is not None:
        folder = start_folder(config.start)
        file = peft_files.tensor_file(folder) if peft_files.is_peft(folder) else folder / TENSOR_FILE
        makers[file] = "train"
    for path, command in makers.items():
        if not path.is_file():
            raise InputError(f"{path}: expected this file, found none; `rellax {command}` makes it")
    with tqdm(makers, "hashes", unit="file", disable=not progress, delay=2) as paths:
        found = {path.name: sha256_file(path) for path in paths}
    if config.retrieved is not None:
        found[EMBEDDINGS] = retrieved_by(config.retrieved)
    return found


def check_input(path: Path, inputs: dict[str, str]) -> None:
    """Raise an InputError unless a file is the one of its name that a run was trained with."""
    if not path.is_file() or sha256_file(path) != inputs.get(path.name):
        raise InputError(f"{path}: expected the file that the run was trained with, found another or none")


def start_folder(start: str) -> Path:
    """The folder of the adapter that stage 2 begins with: a run's, or the one that PEFT wrote."""
    return Path(start) if peft_files.is_peft(start) else Path(start) / "adapter"


@dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """Prompts that are made when they are asked for: of all others no more than 5 bytes are held.

    Attributes:
        samples: (n,) sample of each prompt.
        is_retrieved: (n,) whether it shows the retrieved behaviours, or the most recent ones.
        recent: how many of the retrieved behaviours make room for the most recent ones.
    """

    prompts: PromptBuilder
    inputs: Inputs
    samples: np.ndarray
    is_retrieved: np.ndarray
    recent: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, row: int) -> Example: ...

    @overload
    def __getitem__(self, row: slice) -> Examples: ...

    def __getitem__(self, row: int | slice) -> Example | Examples:
        if isinstance(row, slice):
            return replace(self, samples=self.samples[row], is_retrieved=self.is_retrieved[row])
        sample = int(self.samples[row])
        positions = self._positions(np.array([sample]), bool(self.is_retrieved[row]))[0]
        prompt = self.prompts.build(sample, positions[positions >= 0].tolist())
        label = int(self.inputs.dataset.samples.label[sample])
        return Example(sample, label, prompt.input_ids, prompt.item_ids)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of some of the prompts, (n,) int32, without making them."""
        lengths = np.empty(len(rows), dtype=np.int32)
        for kind in (False, True):
            at = np.flatnonzero(self.is_retrieved[rows] == kind)
            if len(at):
                samples = self.samples[rows[at]]
                lengths[at] = self.prompts.lengths(samples, self._positions(samples, kind))
        return lengths

    def _positions(self, samples: np.ndarray, is_retrieved: bool) -> np.ndarray:
        """(n, k) positions in the samples' histories, the most important first, then -1."""
        position = self.inputs.dataset.samples.position[samples]
        if not is_retrieved:
            return recent(position, self.prompts.k)
        assert self.inputs.retrieved is not None, "TrainConfig asks for the folder with these prompts"
        nearest = self.inputs.retrieved[samples]
        return with_recent(nearest, position, self.recent) if self.recent else nearest


class Task:
    """A language model patched for `config`, and what makes prompts and batches for it.

    The model is on `device`. Without an adapter, A, gates and projector come from the configuration's seed
    and B is zero, so that, but for soft prompts, it predicts what the unpatched model would.

    Raises:
        InputError: `adapter` was trained on other weights than the model's, or with another tokenizer.
    """

    def __init__(
        self,
        config: TrainConfig,
        inputs: Inputs,
        adapter: Path | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.inputs = config, inputs
        tokenizer = load_tokenizer(config.model)
        answers = answer_ids(tokenizer)
        placeholder = add_placeholder(tokenizer) if config.soft_prompt else None
        self.prompts = PromptBuilder(
            tokenizer, inputs.dataset, k=config.k, max_tokens=config.max_tokens, placeholder=placeholder
        )
        self.collator = Collator(
            pad_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            answer_ids=answers,
            soft_prompt=placeholder is not None,
        )
        self.collator = self.collator_of(inputs.instance_embeddings, inputs.probabilities)
        model = load_model(config.model, dtype=config.dtype, quantize=config.quantize, device=device)
        self.model = model
        if adapter is None:
            self._patch(placeholder)
        else:
            self.check_weights(adapter)
            load_adapter(model, adapter)
            self._check_tokens(adapter, placeholder)
        self.place(lambda model: model.to(device))

    def place(self, move: Callable[[Any], Any]) -> None:
        """Put the model where it runs, which decides how batches are made."""
        self.model = move(self.model)
        packing = self.config.packing
        packed = packing == "always" or (packing == "auto" and packing_pays(self.model))
        self.collator = replace(self.collator, packed=packed)

    def collator_of(self, instance_embeddings: Tensor | None, probabilities: Tensor | None) -> Collator:
        """The collator for samples of which the recommendation model says this, as far as it is read."""
        return replace(
            self.collator,
            instance_embeddings=instance_embeddings if self.config.interaction != "none" else None,
            base_probabilities=probabilities if self.config.crm_logit else None,
        )

    def examples(self, samples: Sequence[int] | np.ndarray, prompts: str) -> Examples:
        """The prompts of `samples`: "recent", "retrieved", or a "mixture" of one of each."""
        chosen, count = np.asarray(samples, dtype=np.int32), self.config.recent_behaviours
        if prompts == "mixture":
            is_retrieved = np.tile([False, True], len(chosen))
            return Examples(self.prompts, self.inputs, np.repeat(chosen, 2), is_retrieved, count)
        is_retrieved = np.full(len(chosen), prompts == "retrieved")
        return Examples(self.prompts, self.inputs, chosen, is_retrieved, count)

    def check_weights(self, adapter: Path) -> None:
        """Raise an InputError where an adapter is known to be of a language model with other weights."""
        if is_of_other_weights(self.model, adapter):
            name = self.config.model
            raise InputError(
                f"model: expected the weights that {adapter} was trained on, found others in {name}"
            )

    def _check_tokens(self, adapter: Path, placeholder: int | None) -> None:
        """Raise unless the answers and the placeholder are the tokens that an adapter was trained with."""
        state = self.model.rellax
        soft_prompt = state.soft_prompt
        expected = [*(state.config.answer_ids or ())]
        expected += [] if soft_prompt is None else soft_prompt.placeholder_ids.tolist()
        found = [*self.collator.answer_ids, *([] if placeholder is None else [placeholder])]
        if found != expected:
            raise InputError(
                f"model: expected the tokenizer that {adapter} was trained with, its tokens {expected}, "
                f"found another in {self.config.model}, {found}"
            )

    def _patch(self, placeholder: int | None) -> None:
        config, embeddings = self.config, self.collator.instance_embeddings
        torch.manual_seed(config.seed)
        soft_prompt = None
        if placeholder is not None:
            assert self.inputs.item_embeddings is not None, "TrainConfig asks for a CRM with soft prompts"
            soft_prompt = SoftPromptConfig(self.inputs.item_embeddings, (placeholder,))
        lora = CFLoRAConfig(
            r=config.r,
            alpha=config.alpha,
            dropout=config.dropout,
            target_modules=config.target_modules,
            cond_dim=CFLoRAConfig.cond_dim if embeddings is None else embeddings.shape[1],
            interaction=config.interaction,
            gate_init=config.gate_init,
            loss=config.loss,
            answer_ids=self.collator.answer_ids,
        )
        patch_model(self.model, lora, soft_prompt=soft_prompt)
        if config.gradient_checkpointing:
            checkpoint_activations(self.model)
