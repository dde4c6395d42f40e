"""Training: one loop for stage 1, stage 2 and joint runs, resumable to the last bit."""

from __future__ import annotations

import contextlib
import pickle
import shutil
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rellax._files import atomic_file, read_json, write_json
from rellax.ctr import metrics, runs
from rellax.ctr.batches import epoch_batches, on_device
from rellax.ctr.config import TrainConfig, inherited
from rellax.ctr.dataset import SPLITS
from rellax.ctr.evaluate import predict_probabilities, read_predictions, write_predictions
from rellax.ctr.llm import resolve_device
from rellax.ctr.task import Task, input_hashes, load_inputs
from rellax.errors import InputError, one_line
from rellax.patch import load_adapter, save_adapter

if TYPE_CHECKING:
    from accelerate import Accelerator

_FILES = ("config.json", "environment.json", "log.jsonl", "metrics.json", "predictions.parquet", "curves.png")
_FOLDERS = ("adapter", "checkpoints", *SPLITS)
_CHECKPOINT = "checkpoints/last.pt"


def train(
    config: TrainConfig,
    folder: str | Path,
    *,
    device: str = "auto",
    redo: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a language model and return the contents of the run's metrics.json.

    The run folder then holds config.json, environment.json, log.jsonl, curves.png, adapter/ as it was at the
    step that `config.select` names best on the validation samples, and for that step metrics.json and
    predictions.parquet of those samples. A run that was stopped goes on from its last checkpoint, with the
    same result to the last bit; a finished run is only read. `accelerate launch` and `torchrun` share a batch
    out over processes.

    Args:
        folder: the run folder.
        device: "auto", "cpu" or "cuda".
        redo: begin anew, whatever run the folder holds.
        progress: show a bar.

    Raises:
        InputError: `folder` holds a run of another configuration, or something `config` names does not fit.
    """
    from accelerate import Accelerator

    folder, config = Path(folder), inherited(config)
    where = resolve_device(device)
    request = config.to_json() | {"inputs": input_hashes(config)}
    accelerator = Accelerator(cpu=where.type == "cpu", mixed_precision="no")
    runs.is_claimed(folder, request, redo=redo)
    accelerator.wait_for_everyone()
    if redo and accelerator.is_main_process:
        _clear(folder)
    accelerator.wait_for_everyone()
    if not (folder / "metrics.json").exists():
        _Trainer(config, folder, accelerator, progress).run(request)
    return read_json(folder / "metrics.json")


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Rate of a step: rises over the first `warmup` of all steps, then falls; both linearly."""
    warm = config.warmup * steps
    rise = (step + 1) / warm if warm else 1.0
    fall = (steps - step) / (steps - warm)
    return config.peak_lr * min(rise, fall, 1.0)


class _Trainer:
    """One run.

    What changes is the trainable parameters, the optimiser, `step` and `best`: what a checkpoint holds. The
    order of samples, the learning rate and the random numbers follow from the configuration and the step.
    """

    def __init__(self, config: TrainConfig, folder: Path, accelerator: Accelerator, progress: bool) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.progress = progress and accelerator.is_main_process
        inputs = load_inputs(config)
        shots = inputs.dataset.choose("train", config.shots, config.seed)
        self.chosen = inputs.dataset.choose("valid", config.validation_samples, config.seed)
        self.labels = inputs.dataset.samples.label[self.chosen]
        if config.select == "auc" and self.labels.min() == self.labels.max():
            raise InputError(
                f"validation_samples: the {len(self.chosen)} chosen ones have one label and so no AUC, "
                "expected more of them, or select='log_loss'"
            )
        self.task = Task(config, inputs, device=accelerator.device)
        self._begin_stage()
        self.examples = self.task.examples(shots, config.prompts)
        self.validation = self.task.examples(self.chosen, config.evaluation_prompts)
        self.lengths = self.examples.lengths()
        self.per_epoch = -(-len(self.examples) // config.batch_size)
        self.steps = config.epochs * self.per_epoch

        self.trainable = {name: p for name, p in self.task.model.named_parameters() if p.requires_grad}
        optimiser = torch.optim.AdamW(self.trainable.values(), weight_decay=0.0)
        self.model, self.optimiser = accelerator.prepare(self.task.model, optimiser)
        self.step = 0
        self.best: dict[str, Any] | None = None

    def run(self, request: dict[str, Any]) -> None:
        if runs.is_claimed(self.folder, request):
            self._load_checkpoint()
        log = None
        if self.accelerator.is_main_process:
            write_json(self.folder / "config.json", request)
            write_json(self.folder / "environment.json", runs.environment())
            log = runs.Log(self.folder / "log.jsonl", up_to_step=self.step)
        bar = tqdm(total=self.steps, initial=self.step, desc="train", unit="step", disable=not self.progress)
        with bar:
            while self.step < self.steps:
                entry = self._train_step()
                if self._is_validated():
                    entry |= self._validate()
                if log is not None:
                    log.append(**entry)
                if self.step % self.config.checkpoint_every == 0:
                    self._save_checkpoint()
                bar.set_postfix(loss=f"{entry['loss']:.3f}")
                bar.update()
        if log is not None:
            self._finish(log)
        self.accelerator.wait_for_everyone()

    def _begin_stage(self) -> None:
        """Stage 2 takes over the A and B of stage 1 and freezes them; the other stages train all there is."""
        start, state = self.config.start, self.task.model.rellax
        if start is None:
            return
        load_adapter(self.task.model, Path(start) / "adapter", partial=True)
        if not any(projection.lora_b.any() for projection in state.projections.values()):
            raise InputError(
                f"start: expected a trained adapter, but B is zero in {start}: gates would get no gradient"
            )
        state.set_trainable(lora=False)

    def _train_step(self) -> dict[str, Any]:
        """One step of the optimiser over a batch, which the processes share."""
        config, started = self.config, monotonic()
        epoch, index = divmod(self.step, self.per_epoch)
        rows = epoch_batches(self.lengths, config.batch_size, seed=config.seed, epoch=epoch)[index]
        rate = learning_rate(config, self.step, self.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        state = np.random.SeedSequence((config.seed, self.step, process)).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]))
        loss = self.accelerator.reduce(self._backward(rows, rows[process::processes]), "sum").item()
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        return {
            "step": self.step,
            "epoch": epoch,
            "loss": loss,
            "lr": rate,
            "grad_norm": float(norm),
            "seconds": round(monotonic() - started, 3),
        }

    def _backward(self, rows: np.ndarray, own: np.ndarray) -> Tensor:
        """Gradients of the mean loss over `rows`; returns what this process's `own` rows add to that mean.

        Gradients are exchanged at the last micro-batch. A process without rows takes one that weighs nothing.
        """
        self.model.train()
        size = self.config.micro_batch_size
        parts = [own[start : start + size] for start in range(0, len(own), size)]
        shares = [len(part) / len(rows) for part in parts]
        if not parts:
            parts, shares = [rows[:1]], [0.0]
        total = torch.zeros((), device=self.accelerator.device)
        for number, (part, share) in enumerate(zip(parts, shares, strict=True), start=1):
            batch = self.task.collator.supervised([self.examples[row] for row in part])
            batch = on_device(batch, self.accelerator.device)
            last = number == len(parts)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self.model(**batch).loss * share
                # Data parallelism averages over the processes what is to be summed.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            total += loss.detach()
        return total

    def _is_validated(self) -> bool:
        every = self.config.validate_every or self.per_epoch
        return self.step % every == 0 or self.step == self.steps

    def _validate(self) -> dict[str, float]:
        """Validation metrics; where they are the best so far, the adapter and the predictions are kept."""
        probabilities = self._validation_probabilities()
        result = metrics.evaluate(self.labels, probabilities, bootstrap=0)
        score = result["auc"] if self.config.select == "auc" else -result["log_loss"]
        if self.best is None or score > self.best["score"]:
            self.best = {"step": self.step, "score": score}
            if self.accelerator.is_main_process:
                save_adapter(self.task.model, self.folder / "adapter")
                write_predictions(
                    self.folder / "predictions.parquet", self.chosen, self.labels, probabilities
                )
        return {"validation_auc": result["auc"], "validation_log_loss": result["log_loss"]}

    def _validation_probabilities(self) -> np.ndarray:
        from accelerate.utils import gather_object

        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        own = predict_probabilities(self.task.model, self.task.collator, self.validation[process::processes])
        probabilities = np.empty(len(self.validation))
        for other, part in enumerate(gather_object([own])):
            probabilities[other::processes] = part
        return probabilities

    def _save_checkpoint(self) -> None:
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": self.step,
            "best": self.best,
            "parameters": {name: parameter.detach() for name, parameter in self.trainable.items()},
            "optimiser": self.optimiser.state_dict(),
        }
        with atomic_file(self.folder / _CHECKPOINT) as part:
            torch.save(state, part)

    def _load_checkpoint(self) -> None:
        path = self.folder / _CHECKPOINT
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
            if not isinstance(state, dict) or not {"step", "best", "parameters", "optimiser"} <= state.keys():
                raise EOFError("it lacks a part")
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
            raise InputError(
                f"{path}: expected a checkpoint, but it is damaged ({one_line(error)}); begin with --redo"
            ) from None
        self.step, self.best = state["step"], state["best"]
        self.optimiser.load_state_dict(state["optimiser"])
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(state["parameters"][name])

    def _finish(self, log: runs.Log) -> None:
        """Curves, and metrics of the step that was kept; metrics.json marks the end."""
        assert self.best is not None, "the last step is always validated"
        curves = [("training loss", *log.curve("loss")), ("validation AUC", *log.curve("validation_auc"))]
        runs.plot_curves(self.folder / "curves.png", curves)
        labels, probabilities = read_predictions(self.folder / "predictions.parquet")
        result = {
            "best_step": self.best["step"],
            "steps": self.steps,
            "selected_by": f"validation {self.config.select}",
            "validation": metrics.evaluate(labels, probabilities),
        }
        write_json(self.folder / "metrics.json", result)
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)


def _clear(folder: Path) -> None:
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
