"""Training: one loop for stage 1, stage 2 and joint runs, resumable to the last bit."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from rellax._files import atomic_folder, read_json, write_json, write_place
from rellax.ctr import calibration, metrics, parallel, runs
from rellax.ctr.batches import EpochBatches, on_device
from rellax.ctr.checkpoints import Checkpoints
from rellax.ctr.config import TrainConfig, inherited
from rellax.ctr.dataset import SPLITS, WORDING, WORDING_FILE
from rellax.ctr.evaluate import predict_probabilities
from rellax.ctr.llm import resolve_device
from rellax.ctr.optimiser import adamw, learning_rate
from rellax.ctr.predictions import Predictions
from rellax.ctr.task import Task, input_hashes, load_inputs, start_folder
from rellax.errors import InputError
from rellax.patch import compile_frozen, load_adapter, save_adapter
from rellax.patch.identity import is_other

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

_FILES = (
    "metrics.json",
    "environment.json",
    "place.json",
    WORDING_FILE,
    "log.jsonl",
    "predictions.parquet",
    "curves.png",
    calibration.FILE,
)
_FOLDERS = ("adapter", "checkpoints", "tensorboard", *SPLITS)


def train(
    config: TrainConfig,
    folder: str | Path,
    *,
    device: str = "auto",
    fsdp: bool = False,
    tensorboard: bool = False,
    redo: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a language model and return the contents of the run's metrics.json.

    The run folder then holds config.json, environment.json, log.jsonl, curves.png, adapter/ as it was at the
    step that `config.select` names best on the validation samples, and for that step metrics.json and
    predictions.parquet of those samples. A run that was stopped goes on from its last checkpoint, with the
    same result to the last bit, or to rounding and dropout where it is executed otherwise from then on, in
    smaller micro-batches, say; a finished run is only read. `accelerate launch` and `torchrun` share a batch
    out over processes.

    Args:
        folder: the run folder, which all processes see.
        device: "auto", "cpu" or "cuda".
        fsdp: shard the frozen weights over the processes, instead of one replica on each; so does
            `accelerate launch --use_fsdp --fsdp_version 2`.
        tensorboard: write what log.jsonl holds as event files to tensorboard/ in the run folder as well.
        redo: begin anew, whatever training run the folder holds; it goes when the new one is about to begin.
        progress: show a bar.

    Raises:
        InputError: `folder` is that of `config.start`, holds a run of another configuration, or another
            process trains there, or something `config` names does not fit, or training diverges.
    """
    if tensorboard:
        runs.check_tensorboard()
    folder, config = Path(folder), inherited(config)
    if config.start is not None and Path(config.start).resolve() == folder.resolve():
        raise InputError(f"start: expected another folder than the run's own, got {config.start}")
    accelerator = parallel.start(resolve_device(device))
    inputs = parallel.from_main(accelerator, lambda: input_hashes(config, progress=progress))
    request = config.to_json() | {"inputs": inputs}
    runs.is_claimed(folder, request, command="train", redo=redo)
    with runs.locked(folder) if accelerator.is_main_process else contextlib.nullcontext():
        accelerator.wait_for_everyone()
        if redo or not (folder / "metrics.json").exists():
            sharded = parallel.is_sharded(accelerator, fsdp)
            trainer = _Trainer(config, folder, accelerator, sharded=sharded, progress=progress)
            if redo and accelerator.is_main_process:
                _clear(folder)  # now that nothing is known to be in the way of the new one
            accelerator.wait_for_everyone()
            trainer.run(request, tensorboard=tensorboard)
    return read_json(folder / "metrics.json")


class _Trainer:
    """One run.

    What changes is the trainable parameters, the optimiser, `step`, `best` and `worse`: what a checkpoint
    holds. The order of samples, the learning rate and the random numbers follow from the configuration and
    the step.
    """

    def __init__(
        self, config: TrainConfig, folder: Path, accelerator: Accelerator, *, sharded: bool, progress: bool
    ) -> None:
        self.config, self.folder, self.accelerator, self.sharded = config, folder, accelerator, sharded
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.progress = progress and accelerator.is_main_process
        inputs = load_inputs(config, progress=self.progress)
        shots = inputs.dataset.choose("train", config.shots, config.seed, name="shots")
        self.chosen = inputs.dataset.choose("valid", config.validation_samples, config.seed, at_most=True)
        self.labels = inputs.dataset.samples.label[self.chosen]
        self.users = inputs.dataset.samples.user[self.chosen]
        if config.select == "auc" and self.labels.min() == self.labels.max():
            raise InputError(
                f"validation_samples: the {len(self.chosen)} chosen ones have one label and so no AUC, "
                "expected more of them, or select='log_loss'"
            )
        device = accelerator.device
        self.task = Task(config, inputs, device="cpu" if sharded else device)
        self._begin_stage()
        if config.crm_logit:
            self._compare_shots(len(shots))
        if config.compile:
            compile_frozen(self.task.model)
        if sharded:
            self.task.place(lambda model: parallel.shard(model, device))
        self.examples = self.task.examples(shots, config.prompts)
        self.validation = self.task.examples(self.chosen, config.evaluation_prompts)
        for samples in (shots, self.chosen):
            self.task.prompts.check(samples, progress=self.progress)
        self.per_epoch = -(-len(self.examples) // config.batch_size)
        self.steps = config.epochs * self.per_epoch

        self.trainable = {name: p for name, p in self.task.model.named_parameters() if p.requires_grad}
        self.optimiser = adamw(self.trainable, config)
        replicated = accelerator.num_processes > 1 and not sharded
        self.model = accelerator.prepare_model(self.task.model) if replicated else self.task.model
        self.batches = functools.lru_cache(maxsize=1)(self._epoch_batches)
        self.step = self.finished = 0  # the latter: of those that are done, validation and log included
        self.best: dict[str, Any] | None = None
        self.worse = 0  # validations since the best one

    def run(self, request: dict[str, Any], *, tensorboard: bool) -> None:
        if (processes := self.accelerator.num_processes) > 1:
            holds = "a part of the frozen weights (FSDP2)" if self.sharded else "all weights (DDP)"
            self._say(f"train: {processes} processes, each holds {holds}")
        if (self.folder / "config.json").exists():
            for name, before, now in runs.differing(read_json(self.folder / "config.json"), request):
                self._say(
                    f"train: begun with {name} = {before}, goes on with {now}: the same but for rounding and "
                    "dropout"
                )
            self._load_checkpoint()
        log = None
        if self.accelerator.is_main_process:
            write_json(self.folder / "config.json", request)
            write_json(self.folder / "environment.json", runs.environment())
            write_place(self.folder)
            meta = self.task.inputs.dataset.meta
            write_json(self.folder / WORDING_FILE, {name: meta.get(name) for name in WORDING})
            board = self.folder / "tensorboard" if tensorboard else None
            log = runs.Log(self.folder / "log.jsonl", up_to_step=self.step, board=board)
        bar = tqdm(total=self.steps, initial=self.step, desc="train", unit="step", disable=not self.progress)
        with bar, self._stopping():
            while self.step < self.steps and not self._is_given_up():
                entry = self._train_step()
                if self._is_validated():
                    entry |= self._validate()
                if log is not None:
                    log.append(**entry)
                self.finished = self.step
                if self.step % self.config.checkpoint_every == 0:
                    self._save_checkpoint()
                bar.set_postfix(loss=f"{entry['loss']:.3f}")
                bar.update()
        if log is not None:
            self._finish(log)
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """Keep what was trained where a step that does not end has changed nothing yet."""
        try:
            yield
        except (KeyboardInterrupt, torch.OutOfMemoryError):
            if self.finished == self.step and self.step % self.config.checkpoint_every:
                self._save_checkpoint()
            raise

    def _begin_stage(self) -> None:
        """Stage 2 takes over the A and B of stage 1 and freezes them; the other stages train all there is."""
        start, state = self.config.start, self.task.model.rellax
        if start is None:
            return
        self.task.check_weights(start_folder(start))
        load_adapter(self.task.model, start_folder(start), partial=True)
        if not any(projection.lora_b.any() for projection in state.projections.values()):
            raise InputError(
                f"start: expected a trained adapter, but B is zero in {start}: gates would get no gradient"
            )
        state.set_trainable(lora=False)

    def _compare_shots(self, shots: int) -> None:
        """Say so where the log-odds that answers begin from are of a CRM that was trained on the shots."""
        config = self.config
        assert config.crm is not None, "TrainConfig asks for it"
        known = read_json(Path(config.crm) / "config.json", maker="rellax crm")
        if known.get("seed") != config.seed or (known.get("hold_out") or 0) < shots:
            self._say(
                f"train: {config.crm} has been trained on the shots and seems to know more than it does; "
                f"`rellax crm --hold-out {shots} --seed {config.seed}` makes one that has not"
            )

    def _epoch_batches(self, epoch: int) -> EpochBatches:
        return EpochBatches(
            len(self.examples),
            self.config.batch_size,
            self.examples.lengths,
            seed=self.config.seed,
            epoch=epoch,
        )

    def _train_step(self) -> dict[str, Any]:
        """One step of the optimiser over a batch, which the processes share."""
        config, started = self.config, monotonic()
        epoch, index = divmod(self.step, self.per_epoch)
        rows = self.batches(epoch)[index]
        rate = learning_rate(config, self.step, self.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["share"]
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        state = np.random.SeedSequence((config.seed, self.step, process)).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]))
        loss = self.accelerator.reduce(self._backward(rows, rows[process::processes]), "sum").item()
        norm = clip_grad_norm_(self.trainable.values(), config.clip).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):  # the parameters and checkpoints still are
            raise self._diverged(f"loss {loss} and gradient norm {norm} at step {self.step + 1}")
        self.step += 1
        self.optimiser.step()
        self.optimiser.zero_grad()
        return {
            "step": self.step,
            "epoch": epoch,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "seconds": round(monotonic() - started, 3),
        }

    def _backward(self, rows: np.ndarray, own: np.ndarray) -> Tensor:
        """Gradients of the mean loss over `rows`; returns what this process's `own` rows add to that mean.

        Gradients are exchanged at the last micro-batch. A process without rows takes one that weighs nothing.
        """
        self.model.train()
        size, processes = self.config.micro_batch_size, self.accelerator.num_processes
        parts = [own[start : start + size] for start in range(0, len(own), size)]
        shares = [len(part) / len(rows) for part in parts]
        if not parts:
            parts, shares = [rows[:1]], [0.0]
        if self.sharded:  # its collectives must be as many on every process
            empty = -(-len(rows) // (size * processes)) - len(parts)
            parts, shares = parts + [rows[:1]] * empty, shares + [0.0] * empty
        total = torch.zeros((), device=self.accelerator.device)
        for number, (part, share) in enumerate(zip(parts, shares, strict=True), start=1):
            batch = self.task.collator.supervised([self.examples[row] for row in part])
            batch = on_device(batch, self.accelerator.device)
            exchanged = number == len(parts) or self.sharded
            with contextlib.nullcontext() if exchanged else self.accelerator.no_sync(self.model):
                loss = self.model(**batch).loss * share
                # Data parallelism averages over the processes what is to be summed.
                (loss * processes).backward()
            total += loss.detach()
        if self.sharded:
            parallel.average_gradients(self.trainable.values())
        return total

    def _diverged(self, came: str) -> InputError:
        return InputError(
            f"lr: expected a rate at which training stays finite, got {came}; begin anew with --redo and a "
            f"rate below {self.config.peak_lr:g}"
        )

    def _is_validated(self) -> bool:
        every = self.config.validate_every or self.per_epoch
        return self.step % every == 0 or self.step == self.steps

    def _is_given_up(self) -> bool:
        return self.config.patience is not None and self.worse >= self.config.patience

    def _validate(self) -> dict[str, float | str]:
        """Validation metrics; where they are the best so far, the adapter and the predictions are kept."""
        probabilities = self._validation_probabilities()
        if not np.isfinite(probabilities).all():
            raise self._diverged(f"validation probabilities that are not numbers after step {self.step}")
        result = metrics.evaluate(self.labels, probabilities, bootstrap=0)
        score = result["auc"] if self.config.select == "auc" else -result["log_loss"]
        self.worse += 1
        if self.best is None or score > self.best["score"]:
            self.best, self.worse = {"step": self.step, "score": score}, 0
            if self.accelerator.is_main_process:
                folder = self.checkpoints.best(self.step)
                save_adapter(self.task.model, folder / "adapter")
                Predictions(self.chosen, self.labels, probabilities).write(folder)
        entry = {"validation_auc": result["auc"], "validation_log_loss": result["log_loss"]}
        if self._is_given_up() and self.step < self.steps:
            entry["stopped"] = (
                f"no better validation {self.config.select} than that of step {self.best['step']} "
                f"in {self.worse} validations"
            )
            self._say(f"train: stopped at step {self.step} of {self.steps}: {entry['stopped']}")
        return entry

    def _validation_probabilities(self) -> np.ndarray:
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        own = predict_probabilities(
            self.task.model,
            self.task.collator,
            self.validation,
            batch_size=self.config.eval_batch_size,
            share=(process, processes),
        )
        summed = self.accelerator.reduce(torch.from_numpy(own).to(self.accelerator.device), "sum")
        return summed.cpu().numpy()

    def _say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            logger.info(message)

    def _save_checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            self.checkpoints.save(
                {
                    "step": self.step,
                    "best": self.best,
                    "worse": self.worse,
                    "processes": self.accelerator.num_processes,
                    "base_weights": self.task.model.rellax.base_weights,
                    "parameters": {name: parameter.detach() for name, parameter in self.trainable.items()},
                    "optimiser": self.optimiser.state_dict(),
                }
            )

    def _load_checkpoint(self) -> None:
        state = self.checkpoints.load()
        if state is None:
            self._say(f"{self.checkpoints.folder}: no checkpoint, the run begins at its first step")
            return
        if state["processes"] != self.accelerator.num_processes:
            self._say(
                f"train: begun by {state['processes']} processes, goes on with "
                f"{self.accelerator.num_processes}: the same but for rounding and dropout"
            )
        if is_other(state.get("base_weights", {}), self.task.model.rellax.base_weights):
            raise InputError(
                f"model: expected the weights that {self.folder} was begun with, found others in "
                f"{self.config.model}"
            )
        self.step, self.best, self.worse = state["step"], state["best"], state["worse"]
        self.finished = self.step
        self.optimiser.load_state_dict(state["optimiser"])
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(state["parameters"][name])

    def _finish(self, log: runs.Log) -> None:
        """Curves, and metrics of the step that was kept; metrics.json marks the end."""
        assert self.best is not None, "the last step is always validated"
        log.close()
        curves = [("training loss", *log.curve("loss")), ("validation AUC", *log.curve("validation_auc"))]
        runs.plot_curves(self.folder / "curves.png", curves)
        best = self.checkpoints.best(self.best["step"])
        with atomic_folder(self.folder / "adapter") as part:
            shutil.copytree(best / "adapter", part, dirs_exist_ok=True)
        found = Predictions.read(best)
        found.write(self.folder)
        result = {
            "best_step": self.best["step"],
            "steps": self.step,
            "selected_by": f"validation {self.config.select}",
            "validation": metrics.evaluate(found.labels, found.probabilities, self.users),
        }
        write_json(self.folder / "metrics.json", result)
        shutil.rmtree(self.checkpoints.folder, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Remove a run: metrics.json first and config.json last, so that a kill leaves an unfinished run."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "config.json").unlink(missing_ok=True)
