"""What the command line takes: commands, their options, and the help of each."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rellax import __version__
from rellax.ctr.config import (
    CHOICES,
    CRM_SAMPLES,
    DATASETS,
    SIMILARITIES,
    CRMConfig,
    DemoConfig,
    StudyConfig,
    TrainConfig,
)

Command = Callable[[str, str, str, str], argparse.ArgumentParser]

_WORK = Path("runs/ml-100k")
_CHOICES: dict[str, Sequence[str]] = {
    **CHOICES,
    "device": ("auto", "cpu", "cuda"),
    "crm_samples": CRM_SAMPLES,
    "similarity": SIMILARITIES,
}
TRAIN_HELP = {
    "stage": "1: LoRA; 2: gates and soft-prompt projector over frozen LoRA; joint: all at once",
    "interaction": "gates between the LoRA components",
    "gate_init": "identity: stage 2 begins with the stage-1 model; kaiming: as published",
    "soft_prompt": "soft prompts after each behaviour and after the target",
    "crm_logit": "begin from the classical model's log-odds and learn what they lack",
    "prompts": "the K most recent behaviours, the K retrieved ones, or each sample once with either",
    "recent_share": "of a retrieved prompt's K behaviours so many are the most recent ones",
    "k": "behaviours in a prompt",
    "max_tokens": "tokens in a prompt, at most",
    "shots": "random training samples (default: all)",
    "epochs": "passes over the training samples",
    "lr": "peak learning rate (default: 1e-3, of stage 2 3e-4)",
    "soft_prompt_lr": "peak learning rate of the soft-prompt projector (default: --lr's)",
    "batch_size": "prompts in a step",
    "micro_batch_size": "prompts at once, at most",
    "eval_batch_size": "prompts that are scored at once (default: 16, on a GPU 64)",
    "schedule": "of the learning rate after its rise",
    "warmup": "fraction of the steps in which the learning rate rises",
    "weight_decay": "of AdamW, on all that is trained but biases and norms",
    "clip": "largest norm of the gradient",
    "loss": "over the two answers or the whole vocabulary",
    "r": "rank of LoRA, on a GPU at most 64",
    "alpha": "LoRA is scaled by alpha / r",
    "dropout": "of LoRA's input",
    "target_modules": "linear layers to adapt",
    "validation_samples": "random validation samples",
    "validate_every": "steps between validations (default: an epoch)",
    "select": "validation metric that chooses the step that is kept",
    "patience": "validations without a better one after which the run ends (default: all epochs)",
    "checkpoint_every": "steps between checkpoints",
    "gradient_checkpointing": "less memory for more time: each layer is computed again in the backward pass",
    "compile": "the frozen model's norms and MLPs: steps are faster, the first one waits for the compiler",
    "packing": "a batch's prompts one after another, not padded; auto: where that is no slower",
    "dtype": "of the frozen weights; auto: bfloat16 where the hardware has it",
    "quantize": "of the frozen linear layers; int8, nf4, fp4: bitsandbytes, the others: torchao",
    "seed": "of samples, their order, initial values and dropout",
}
PROMPT_FIELDS = ("prompts", "recent_share", "k", "max_tokens", "packing", "dtype", "quantize")
CRM_HELP = {
    "model": "DIN, SIM, ETA, SDIM, DCNv2 or DeepFM",
    "shots": "random training samples (default: all)",
    "hold_out": "training samples to leave out: the shots of `rellax train`",
    "max_len": "behaviours that it reads: the most recent ones",
    "user_id": "the user's id is a feature; most users of the later splits are new",
    "embedding_dim": "of every feature",
    "hidden": "widths of the final layers; gates read the last one",
    "dropout": "in the final layers",
    "regularizer": "weight of the embeddings' L2 norm",
    "epochs": "passes over the training samples, at most",
    "patience": "validations, two an epoch, without a better AUC after which it ends",
    "lr": "learning rate",
    "batch_size": "samples in a step (default: a 32nd of them all, from 64 to 1024)",
    "seed": "of samples, initial values and dropout",
}
DEMO_HELP = {
    "shots": "training samples",
    "k": "behaviours in a prompt",
    "test_samples": "random test samples, at most",
    "validation_samples": "random validation samples",
    "batch_size": "prompts in a step",
    "micro_batch_size": "prompts at once, at most",
    "eval_batch_size": "prompts that are scored at once (default: 16, on a GPU 64)",
    "epochs": "of stage 1",
    "lr": "of stage 1",
    "epochs2": "of stage 2",
    "lr2": "of stage 2",
    "soft_prompt_lr": "of the soft-prompt projector (default: --lr2's)",
    "crm_epochs": "of the classical models, at most",
    "similarity": "what behaviours are retrieved by: the item texts' embeddings alone, or with those of a "
    "classical model",
    "recent_share": "of a retrieved prompt's K behaviours so many are the most recent ones",
    "few_shot_crm": "retrieval, gates and soft prompts from the DIN trained on the same shots",
    "model": "folder or hub name of another language model (default: SmolLM2-135M-Instruct)",
    "raw": "folder with MovieLens-100K (default: fetched)",
    "seed": "of everything random",
}
STUDY_HELP = DEMO_HELP | {
    "shots": "axis of the grid: training samples",
    "k": "axis of the grid: behaviours in a prompt",
    "seeds": "axis of the grid: of samples, their order, initial values and dropout",
    "methods": "axis of the grid; what one builds on is run as well",
    "crms": "classical models beside them, on the same shots and on all training samples",
    "data": "folder of `rellax prepare` (default: MovieLens-100K)",
    "crm": "classical model that gates and soft prompts read",
    "crm_samples": "what that one is trained on: all training samples, all but the shots, or the shots",
}
STUDY_HELP = {name: text for name, text in STUDY_HELP.items() if name not in ("few_shot_crm", "seed")}


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows defaults that say something, and examples as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or isinstance(action.default, bool) or action.default is argparse.SUPPRESS:
            return action.help
        default = " ".join(map(str, action.default)) if isinstance(action.default, tuple) else action.default
        return f"{action.help} (default: {default})"


class _Tuple(argparse.Action):
    """Values as a tuple, which a configuration has."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def make_parser() -> argparse.ArgumentParser:
    """The parser; of a command's options, `command` is its name."""
    parser = argparse.ArgumentParser(
        prog="rellax",
        description="Click-through-rate prediction with language models on long user histories.",
        epilog=_examples(
            "rellax demo\nrellax prepare --dataset ml-1m --work runs/ml-1m\nrellax train rella --shots 256"
        ),
        formatter_class=_Formatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"rellax {__version__}", help="show it and exit"
    )
    command = partial(_command, parser.add_subparsers(metavar="COMMAND", required=True))
    for add in (
        _demo,
        _reproduce,
        _prepare,
        _crm,
        _embed,
        _retrieve,
        _train,
        _evaluate,
        _calibrate,
        _predict,
        _export,
        _report,
        _doctor,
    ):
        add(command)
    return parser


def _demo(command: Command) -> None:
    parser = command("demo", "device", "run all of it and compare every variant", "rellax demo --shots 1024")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything")
    _add_fields(parser, DemoConfig, DEMO_HELP)


def _reproduce(command: Command) -> None:
    parser = command(
        "reproduce",
        "device",
        "run the study: methods x K x shots x seeds; a stopped one goes on",
        "rellax reproduce --plan\n"
        "rellax reproduce --k 5 10 30 --shots 256 1024 --seeds 0\n"
        "rellax reproduce --jobs 8 --micro-batch-size 16                 # a small model on a large GPU\n"
        "rellax reproduce --data runs/ml-1m/data --model Qwen/Qwen3-0.6B --out runs/study-ml-1m",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder for everything")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--plan", action="store_true", help="say how long the grid takes here, run none of it")
    only.add_argument("--report", action="store_true", help="report on what is finished, run nothing")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, where a GPU or many cores have room for several"
    )
    _add_fields(parser, StudyConfig, STUDY_HELP)


def _prepare(command: Command) -> None:
    parser = command(
        "prepare",
        "work",
        "raw ratings to samples",
        "rellax prepare\n"
        "rellax prepare --dataset ml-1m --raw Downloads/ml-1m --work runs/ml-1m\n"
        "rellax prepare --columns shop/columns.json --work runs/shop",
    )
    parser.add_argument("--dataset", choices=DATASETS, help="a published data set (default: ml-100k)")
    parser.add_argument("--columns", type=Path, help="or: column map of your own tables, docs/own-data.md")
    parser.add_argument(
        "--raw", type=Path, help="folder with the raw files (default: fetched, or that of the column map)"
    )
    parser.add_argument("--min-history", type=int, default=5, help="earlier behaviours that a sample needs")
    parser.add_argument(
        "--split",
        type=int,
        nargs=3,
        default=(8, 1, 1),
        metavar=("TRAIN", "VALID", "TEST"),
        help="proportions of the three splits",
    )
    parser.add_argument(
        "--strictly-before",
        action="store_true",
        help="histories end before the first behaviour of the target's time",
    )


def _crm(command: Command) -> None:
    parser = command(
        "crm",
        "device redo work",
        "train the classical model",
        "rellax crm\nrellax crm sim --model SIM --max-len 100",
    )
    parser.add_argument("name", nargs="?", default="crm", help="run folder, in the work folder")
    _add_fields(parser, CRMConfig, CRM_HELP)


def _embed(command: Command) -> None:
    parser = command(
        "embed",
        "device redo ray work model",
        "item texts to embeddings",
        "rellax embed --dim 256\nrellax embed --crm crm\nrellax embed --ray",
    )
    parser.add_argument(
        "--crm",
        metavar="NAME",
        help="run of `rellax crm` whose item embeddings stand beside (default: text alone)",
    )
    parser.add_argument("--dim", type=int, default=512, help="principal components that are kept")


def _retrieve(command: Command) -> None:
    parser = command(
        "retrieve",
        "device redo ray work",
        "nearest behaviours of all samples; after new data of what is new",
        "rellax retrieve\nrellax retrieve --ray --workers 8",
    )
    parser.add_argument("--k", type=int, default=30, help="behaviours for a sample, at most")
    parser.add_argument("--scores", action="store_true", help="write their similarities as well")


def _train(command: Command) -> None:
    parser = command(
        "train",
        "device redo work model",
        "train the language model; a stopped run is resumed",
        "rellax train rella --shots 1024\n"
        "rellax train rellax --stage 2 --from rella --interaction full --soft-prompt --shots 1024\n"
        "torchrun --nproc-per-node 8 -m rellax train rella --batch-size 256          # 8 GPUs\n"
        "torchrun --nproc-per-node 8 -m rellax train rella --batch-size 256 --fsdp   # a large model\n"
        "accelerate launch -m rellax train rella                                     # as configured",
    )
    parser.add_argument("name", help="run folder, in the work folder")
    parser.add_argument(
        "--from",
        dest="start",
        metavar="NAME",
        help="what stage 2 starts from: a run of stage 1, or a folder of LoRA saved by PEFT",
    )
    parser.add_argument("--crm", default="crm", metavar="NAME", help="run of `rellax crm` that is used")
    parser.add_argument(
        "--fsdp", action="store_true", help="shard the frozen weights over the processes (FSDP2)"
    )
    parser.add_argument(
        "--tensorboard", action="store_true", help="write event files to the run folder as well"
    )
    _add_fields(parser, TrainConfig, TRAIN_HELP)


def _evaluate(command: Command) -> None:
    parser = command(
        "evaluate",
        "device work model",
        "metrics of a training run, or of the untrained model",
        "rellax evaluate rella --samples 1000\nrellax evaluate zero-shot --zero-shot --prompts recent",
    )
    parser.add_argument("name", help="run folder, in the work folder")
    parser.add_argument("--split", default="test", choices=["train", "valid", "test"], help="what to score")
    parser.add_argument("--samples", type=int, help="random samples of the split (default: all)")
    parser.add_argument("--zero-shot", action="store_true", help="the model as it is, with these prompts:")
    parser.add_argument("--seed", type=int, default=0, help="of the chosen samples")
    parser.add_argument(
        "--batch-size",
        type=int,
        dest="eval_batch_size",
        metavar="N",
        help="prompts at once (default: the run's --eval-batch-size)",
    )
    _add_fields(parser, TrainConfig, {name: TRAIN_HELP[name] for name in PROMPT_FIELDS}, defaults=False)


def _calibrate(command: Command) -> None:
    parser = command(
        "calibrate",
        "work",
        "fit a run's temperature, or its weight beside a classical model, on its validation predictions",
        "rellax calibrate rella\nrellax calibrate rella --crm sim",
    )
    parser.add_argument("name", help="run folder of `rellax train`, in the work folder")
    parser.add_argument(
        "--crm", metavar="NAME", help="run of `rellax crm` to stack it on (default: a temperature alone)"
    )


def _predict(command: Command) -> None:
    parser = command(
        "predict",
        "device work",
        "probabilities for users and items: a table, or JSON lines from standard input",
        "rellax predict rella new.csv --out scored.parquet\n"
        """echo '{"user_id": 7, "item_id": 50}' | rellax predict rella""",
    )
    parser.add_argument("name", help="run folder of `rellax train`, in the work folder")
    parser.add_argument(
        "table",
        nargs="?",
        default="-",
        help=".csv, .parquet or .jsonl with user_id, item_id, maybe time; -: JSON lines from standard input",
    )
    parser.add_argument(
        "--out", default="-", help=".csv or .parquet for a table, .jsonl for JSON lines; -: standard output"
    )
    parser.add_argument("--columns", type=Path, help="column map of your own data, docs/own-data.md")
    parser.add_argument("--data", type=Path, help="folder of `rellax prepare` (default: the run's)")
    parser.add_argument(
        "--errors", default="stop", choices=("stop", "answer"), help="what follows from a row that is wrong"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="prompts at once, at most")
    parser.add_argument(
        "--no-calibration",
        dest="calibrated",
        action="store_false",
        help="without what `rellax calibrate` found",
    )


def _export(command: Command) -> None:
    parser = command(
        "export-peft",
        "work",
        "a training run's LoRA for PEFT, without gates and soft prompt",
        "rellax export-peft rella peft-adapter",
    )
    parser.add_argument("name", help="run folder of `rellax train`, in the work folder")
    parser.add_argument("out", type=Path, help="folder to write")


def _report(command: Command) -> None:
    parser = command(
        "report",
        "work",
        "a page about runs to look at and pass on: one HTML file",
        "rellax report rella rellax crm\nrellax report rella rellax --baseline rella --out rellax.html",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, in the work folder")
    parser.add_argument("--out", type=Path, help="file to write (default: report.html in the work folder)")
    parser.add_argument("--split", default="test", choices=["train", "valid", "test"], help="what is scored")
    parser.add_argument(
        "--baseline", metavar="RUN", help="run that others are compared with (default: first)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of resamplings and of the samples that are shown"
    )


def _doctor(command: Command) -> None:
    parser = command(
        "doctor",
        "",
        "what this machine has, which backend each operator uses, and a self-test",
        "rellax doctor\nrellax doctor --json > machine.json",
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def _command(commands: Any, name: str, common: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """A command with those of the options that several have that `common` names."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=_examples(examples),
        formatter_class=_Formatter,
    )
    parser.set_defaults(command=name)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    if "device" in common:
        parser.add_argument("--device", default="auto", choices=_CHOICES["device"], help="where models run")
    if "redo" in common:
        parser.add_argument("--redo", action="store_true", help="begin anew, in place of an earlier run")
    if "ray" in common:
        parser.add_argument("--ray", action="store_true", help="on the cluster of Ray that RAY_ADDRESS names")
        parser.add_argument("--workers", type=int, help="with --ray (default: one for each GPU, or node)")
    if "work" in common:
        parser.add_argument("--work", type=Path, default=_WORK, help="work folder, where all folders are")
    if "model" in common:
        parser.add_argument("--model", help="folder or hub name (default: SmolLM2-135M-Instruct, fetched)")
    return parser


def _examples(lines: str) -> str:
    return "examples:\n  " + lines.replace("\n", "\n  ")


def _add_fields(
    parser: argparse.ArgumentParser, config: Any, helps: dict[str, str], *, defaults: bool = True
) -> None:
    """An option for each named field of a configuration; without `defaults` absent where it is not given."""
    types = {"int": int, "float": float, "str": str}
    for field in dataclasses.fields(config):
        if field.name not in helps:
            continue
        options: dict[str, Any] = {"help": helps[field.name]}
        options["default"] = field.default if defaults else argparse.SUPPRESS
        annotation = str(field.type).removesuffix(" | None")
        if annotation == "bool":
            options["action"] = "store_true"
        elif annotation.startswith("tuple"):
            kind = annotation.removeprefix("tuple[").split(",")[0]
            options |= {"action": _Tuple, "nargs": "+", "type": types[kind]}
            options["metavar"] = "N" if kind == "int" else "NAME"
        else:
            options |= {"type": types[annotation], "choices": _CHOICES.get(field.name)}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options)
