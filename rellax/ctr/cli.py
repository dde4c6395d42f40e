"""The command `rellax`. Commands import what they need when they run, so that --help is quick."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rellax import __version__
from rellax.ctr.config import (
    CRM_SAMPLES,
    DATASETS,
    INTERACTIONS,
    PACKING,
    PROMPTS,
    QUANTIZE,
    SCHEDULES,
    STAGES,
    DemoConfig,
    StudyConfig,
    TrainConfig,
)
from rellax.errors import InputError

if TYPE_CHECKING:
    from rellax.ctr.jobs import Cluster

_WORK = Path("runs/ml-100k")
_CHOICES: dict[str, Sequence[str]] = {
    "stage": STAGES,
    "prompts": PROMPTS,
    "interaction": INTERACTIONS,
    "loss": ("choice", "vocab"),
    "select": ("auc", "log_loss"),
    "packing": PACKING,
    "schedule": SCHEDULES,
    "dtype": ("auto", "float32", "bfloat16"),
    "quantize": QUANTIZE,
    "device": ("auto", "cpu", "cuda"),
    "crm_samples": CRM_SAMPLES,
}
_TRAIN_HELP = {
    "stage": "1: LoRA; 2: gates and soft-prompt projector over frozen LoRA; joint: all at once",
    "interaction": "gates between the LoRA components",
    "soft_prompt": "soft prompts after each behaviour and after the target",
    "prompts": "the K most recent behaviours, the K retrieved ones, or each sample once with either",
    "k": "behaviours in a prompt",
    "max_tokens": "tokens in a prompt, at most",
    "shots": "random training samples (default: all)",
    "epochs": "passes over the training samples",
    "lr": "peak learning rate (default: the stage's own)",
    "batch_size": "prompts in a step",
    "micro_batch_size": "prompts at once, at most",
    "schedule": "of the learning rate after its rise",
    "warmup": "fraction of the steps in which the learning rate rises",
    "weight_decay": "of AdamW, on all that is trained but biases and norms",
    "loss": "over the two answers or the whole vocabulary",
    "r": "rank of LoRA",
    "alpha": "LoRA is scaled by alpha / r",
    "dropout": "of LoRA's input",
    "target_modules": "linear layers to adapt",
    "validation_samples": "random validation samples",
    "validate_every": "steps between validations (default: an epoch)",
    "select": "validation metric that chooses the step that is kept",
    "patience": "validations without a better one after which the run ends (default: all epochs)",
    "checkpoint_every": "steps between checkpoints",
    "gradient_checkpointing": "less memory for more time: each layer is computed again in the backward pass",
    "packing": "a batch's prompts one after another, not padded; auto: where that is no slower",
    "dtype": "of the frozen weights; auto: bfloat16 where the hardware has it",
    "quantize": "of the frozen linear layers; int8, nf4, fp4: bitsandbytes, the others: torchao",
    "seed": "of samples, their order, initial values and dropout",
}
_PROMPT_FIELDS = ("prompts", "k", "max_tokens", "packing", "dtype", "quantize")
_DEMO_HELP = {
    "shots": "training samples",
    "k": "behaviours in a prompt",
    "test_samples": "random test samples",
    "validation_samples": "random validation samples",
    "batch_size": "prompts in a step",
    "epochs": "of stage 1",
    "lr": "of stage 1",
    "epochs2": "of stage 2",
    "lr2": "of stage 2",
    "crm_epochs": "of the classical models, at most",
    "few_shot_crm": "gates and soft prompts from the DIN trained on the same shots",
    "model": "folder or hub name of another language model (default: SmolLM2-135M-Instruct)",
    "raw": "folder with MovieLens-100K (default: fetched)",
    "seed": "of everything random",
}


_STUDY_HELP = _DEMO_HELP | {
    "shots": "axis of the grid: training samples",
    "k": "axis of the grid: behaviours in a prompt",
    "seeds": "axis of the grid: of samples, their order, initial values and dropout",
    "methods": "axis of the grid; what one builds on is run as well",
    "crms": "classical models beside them, on the same shots and on all training samples",
    "data": "folder of `rellax prepare` (default: MovieLens-100K)",
    "crm": "classical model that gates and soft prompts read",
    "crm_samples": "what that one is trained on: all training samples, all but the shots, or the shots",
}
_STUDY_HELP = {name: text for name, text in _STUDY_HELP.items() if name not in ("few_shot_crm", "seed")}
_MACHINE_SAYS_NO = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows defaults that say something, and examples as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS):
            return action.help
        default = " ".join(map(str, action.default)) if isinstance(action.default, tuple) else action.default
        return f"{action.help} (default: {default})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns 0; 1 where `doctor` found a fault; 2 for bad input, a disk that is full or locked, or a package
    that is missing; 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("rellax").setLevel(logging.INFO)
    try:
        if options.threads is not None:
            _set_threads(options.threads)
        _check_run_name(options)
        return options.run(options) or 0
    except InputError as error:
        print(f"rellax: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("rellax"):
            raise
        print(
            f"rellax: error: {error.name}: expected this package, found none; "
            "`pip install 'rellax[ctr]'` brings what the commands need",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        if error.errno not in _MACHINE_SAYS_NO:
            raise
        print(f"rellax: error: {error}; nothing was left half-written", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nrellax: stopped; the same command goes on from where it was", file=sys.stderr)
        return 130


def _prepare(options: argparse.Namespace) -> None:
    from rellax.ctr.prepare import prepare, summary
    from rellax.ctr.sources import READERS, read_own

    if options.columns is None:
        name = options.dataset or "ml-100k"
        source = READERS[name](_fetched(name) if options.raw is None else options.raw)
    elif options.dataset is None:
        source = read_own(options.columns, options.raw)
    else:
        raise InputError("columns: expected either --dataset or --columns, got both")
    print(f"{options.work / 'data'}: {summary(prepare(source, options.work / 'data'))}")


def _fetched(name: str) -> Path:
    if name == "ml-100k":
        from rellax.ctr.assets import movielens_100k

        return movielens_100k()
    from rellax.ctr.downloads import published

    return published(name)


def _crm(options: argparse.Namespace) -> None:
    from rellax.ctr.crm import CRMConfig, train_crm
    from rellax.ctr.dataset import Dataset
    from rellax.ctr.llm import resolve_device
    from rellax.ctr.runs import is_claimed

    folder = options.work / options.name
    config = CRMConfig(model=options.model, shots=options.shots, hold_out=options.hold_out, seed=options.seed)
    if not is_claimed(folder, dataclasses.asdict(config), redo=options.redo):
        device = str(resolve_device(options.device))
        train_crm(Dataset.load(options.work / "data"), folder, config, device=device)
    print(folder)


def _embed(options: argparse.Namespace) -> None:
    from rellax.ctr.embedding import embed

    config = {"data": str(options.work / "data"), "model": _model(options), "dim": options.dim}
    embed(config, options.work / "embeddings", cluster=_cluster(options), **_run_options(options))
    print(options.work / "embeddings")


def _retrieve(options: argparse.Namespace) -> None:
    from rellax.ctr.retrieval import retrieve

    config: dict[str, Any] = {name: str(options.work / name) for name in ("data", "embeddings")}
    config |= {"k": options.k} | ({"scores": True} if options.scores else {})
    retrieve(config, options.work / "retrieved", cluster=_cluster(options), **_run_options(options))
    print(options.work / "retrieved")


def _train(options: argparse.Namespace) -> None:
    from rellax.ctr.train import train

    folder = options.work / options.name
    result = train(
        _train_config(options, start=_start(options)),
        folder,
        fsdp=options.fsdp,
        tensorboard=options.tensorboard,
        **_run_options(options),
    )
    print(f"{folder}: step {result['best_step']} of {result['steps']} is kept")


def _start(options: argparse.Namespace) -> str | None:
    """What --from names: a run in the work folder, or else any folder."""
    if options.start is None:
        return None
    run = options.work / options.start
    return str(options.start if not run.exists() and Path(options.start).exists() else run)


def _evaluate(options: argparse.Namespace) -> None:
    from rellax.ctr.evaluate import evaluate, evaluate_zero_shot

    folder = options.work / options.name
    sizes = {
        "split": options.split,
        "samples": options.samples,
        "seed": options.seed,
        "device": options.device,
    }
    given = [name for name in _PROMPT_FIELDS if hasattr(options, name)]
    if options.zero_shot:
        result = evaluate_zero_shot(_train_config(options), folder / options.split, **sizes)
    elif given:
        raise InputError(f"{given[0]}: only with --zero-shot, a training run is scored with its own prompts")
    else:
        result = evaluate(folder, **sizes)
    for key in ("auc", "gauc", "log_loss", "acc", "ece"):
        low_high = result.get(f"{key}_interval")
        interval = "" if low_high is None else f"  [{low_high[0]:.4f}, {low_high[1]:.4f}]"
        print(f"{key:9} " + ("-" if result[key] is None else f"{result[key]:.4f}{interval}"))
    for key, value in result.get("calibrated", {}).items():
        if not key.endswith("_interval"):
            print(f"{key if key == 'temperature' else f'calibrated {key}':20} {value:.4f}")


def _calibrate(options: argparse.Namespace) -> None:
    from rellax.ctr.evaluate import calibrate

    result = calibrate(options.work / options.name)
    print(f"temperature {result['temperature']:.4f}, fitted on {result['samples']:,} validation samples:")
    for key in ("ece", "log_loss"):
        print(f"{key:9} {result[key]['before']:.4f} -> {result[key]['after']:.4f}")


def _predict(options: argparse.Namespace) -> None:
    from rellax.ctr.predict import STREAM, predict

    names = ("columns", "errors", "data", "device", "batch_size", "calibrated")
    chosen = {name: getattr(options, name) for name in names}
    rows = predict(options.work / options.name, options.table, options.out, **chosen)
    if options.out != STREAM:
        print(f"{options.out}: {rows:,} rows")


def _export_peft(options: argparse.Namespace) -> None:
    from rellax.ctr.config import read_config
    from rellax.patch import export_peft

    run = options.work / options.name
    export_peft(run / "adapter", options.out, base_model=read_config(run).model)
    print(options.out)


def _report(options: argparse.Namespace) -> None:
    from rellax.ctr.report import report

    out = options.work / "report.html" if options.out is None else options.out
    report(options.work, options.runs, out, split=options.split, baseline=options.baseline, seed=options.seed)
    print(out)


def _doctor(options: argparse.Namespace) -> int:
    from rellax.ctr.doctor import doctor

    return doctor(as_json=options.json)


def _demo(options: argparse.Namespace) -> None:
    from rellax.ctr.demo import demo

    config = DemoConfig(**{name: getattr(options, name) for name in _DEMO_HELP})
    print(demo(config, options.out, device=options.device))
    print(f"\nThe report is {options.out / 'report.md'}")


def _reproduce(options: argparse.Namespace) -> None:
    from rellax.ctr.study import reproduce

    config = StudyConfig(**{name: getattr(options, name) for name in _STUDY_HELP})
    only = "plan" if options.plan else "report" if options.report else None
    print(reproduce(config, options.out, device=options.device, only=only))
    if only != "plan":
        print(f"The report is {options.out / 'report.md'}")


def _train_config(options: argparse.Namespace, **more: Any) -> TrainConfig:
    values = {name: getattr(options, name) for name in _TRAIN_HELP if hasattr(options, name)} | more
    prompts = values.get("prompts", TrainConfig.prompts)
    gated = values.get("soft_prompt") or values.get("interaction", "none") != "none"
    return TrainConfig(
        data=str(options.work / "data"),
        model=_model(options),
        retrieved=str(options.work / "retrieved") if prompts != "recent" else None,
        crm=str(options.work / options.crm) if gated else None,
        **values,
    )


def _model(options: argparse.Namespace) -> str:
    if options.model is not None:
        return str(options.model)
    from rellax.ctr.assets import smollm2_135m

    return str(smollm2_135m())


def _run_options(options: argparse.Namespace) -> dict[str, Any]:
    return {"device": options.device, "redo": options.redo}


def _cluster(options: argparse.Namespace) -> Cluster | None:
    from rellax.ctr.jobs import Cluster

    if not options.ray:
        if options.workers is not None:
            raise InputError("workers: only with --ray, one process does without")
        return None
    return Cluster(options.workers, gpu=options.device != "cpu")


def _check_run_name(options: argparse.Namespace) -> None:
    """A run is a folder in the work folder: --redo clears it, so it may not lie elsewhere."""
    name = getattr(options, "name", None)
    if name is not None and (Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts):
        raise InputError(f"name: expected the name of a run in the work folder, got {name!r}")


def _set_threads(threads: int) -> None:
    import torch

    if threads < 1:
        raise InputError(f"threads: expected a positive number, got {threads}")
    torch.set_num_threads(threads)


def _parser() -> argparse.ArgumentParser:
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
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    demo = _command(
        commands, "demo", _demo, "run all of it and compare every variant", "rellax demo --shots 1024"
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything")
    _add_fields(demo, DemoConfig, _DEMO_HELP)

    reproduce = _command(
        commands,
        "reproduce",
        _reproduce,
        "run the study: methods x K x shots x seeds; a stopped one goes on",
        "rellax reproduce --plan\n"
        "rellax reproduce --k 5 10 30 --shots 256 1024 --seeds 0\n"
        "rellax reproduce --data runs/ml-1m/data --model Qwen/Qwen3-0.6B --out runs/study-ml-1m",
    )
    reproduce.add_argument("--out", type=Path, default=Path("runs/study"), help="folder for everything")
    only = reproduce.add_mutually_exclusive_group()
    only.add_argument("--plan", action="store_true", help="say how long the grid takes here, run none of it")
    only.add_argument("--report", action="store_true", help="report on what is finished, run nothing")
    _add_fields(reproduce, StudyConfig, _STUDY_HELP)

    prepare = _command(
        commands,
        "prepare",
        _prepare,
        "raw ratings to samples",
        "rellax prepare\n"
        "rellax prepare --dataset ml-1m --raw Downloads/ml-1m --work runs/ml-1m\n"
        "rellax prepare --columns shop/columns.json --work runs/shop",
    )
    prepare.add_argument("--dataset", choices=DATASETS, help="a published data set (default: ml-100k)")
    prepare.add_argument("--columns", type=Path, help="or: column map of your own tables, docs/own-data.md")
    prepare.add_argument(
        "--raw", type=Path, help="folder with the raw files (default: fetched, or that of the column map)"
    )

    crm = _command(
        commands, "crm", _crm, "train the classical model", "rellax crm\nrellax crm sim --model SIM"
    )
    crm.add_argument("name", nargs="?", default="crm", help="run folder, in the work folder")
    crm.add_argument("--model", default="DIN", help="DIN, SIM, ETA, SDIM, DCNv2 or DeepFM")
    crm.add_argument("--shots", type=int, help="random training samples (default: all)")
    crm.add_argument(
        "--hold-out", type=int, help="training samples to leave out: the shots of `rellax train`"
    )
    crm.add_argument("--seed", type=int, default=0, help="of samples, initial values and dropout")

    embed = _command(
        commands, "embed", _embed, "item texts to embeddings", "rellax embed --dim 256\nrellax embed --ray"
    )
    embed.add_argument("--dim", type=int, default=512, help="principal components that are kept")

    retrieve = _command(
        commands,
        "retrieve",
        _retrieve,
        "nearest behaviours of all samples; after new data of what is new",
        "rellax retrieve\nrellax retrieve --ray --workers 8",
    )
    retrieve.add_argument("--k", type=int, default=30, help="behaviours for a sample, at most")
    retrieve.add_argument("--scores", action="store_true", help="write their similarities as well")

    train = _command(
        commands,
        "train",
        _train,
        "train the language model; a stopped run is resumed",
        "rellax train rella --shots 1024\n"
        "rellax train rellax --stage 2 --from rella --interaction full --soft-prompt --shots 1024\n"
        "torchrun --nproc-per-node 8 -m rellax train rella --batch-size 256          # 8 GPUs\n"
        "torchrun --nproc-per-node 8 -m rellax train rella --batch-size 256 --fsdp   # a large model\n"
        "accelerate launch -m rellax train rella                                     # as configured",
    )
    train.add_argument("name", help="run folder, in the work folder")
    train.add_argument(
        "--from",
        dest="start",
        metavar="NAME",
        help="what stage 2 starts from: a run of stage 1, or a folder of LoRA saved by PEFT",
    )
    train.add_argument("--crm", default="crm", metavar="NAME", help="run of `rellax crm` that is used")
    train.add_argument(
        "--fsdp", action="store_true", help="shard the frozen weights over the processes (FSDP2)"
    )
    train.add_argument(
        "--tensorboard", action="store_true", help="write event files to the run folder as well"
    )
    _add_fields(train, TrainConfig, _TRAIN_HELP)

    evaluate = _command(
        commands,
        "evaluate",
        _evaluate,
        "metrics of a training run, or of the untrained model",
        "rellax evaluate rella --samples 1000\nrellax evaluate zero-shot --zero-shot --prompts recent",
    )
    evaluate.add_argument("name", help="run folder, in the work folder")
    evaluate.add_argument("--split", default="test", choices=["train", "valid", "test"], help="what to score")
    evaluate.add_argument("--samples", type=int, help="random samples of the split (default: all)")
    evaluate.add_argument("--zero-shot", action="store_true", help="the model as it is, with these prompts:")
    evaluate.add_argument("--seed", type=int, default=0, help="of the chosen samples")
    _add_fields(evaluate, TrainConfig, {name: _TRAIN_HELP[name] for name in _PROMPT_FIELDS}, defaults=False)

    calibrate = _command(
        commands,
        "calibrate",
        _calibrate,
        "fit a run's temperature on its validation predictions",
        "rellax calibrate rella",
    )
    calibrate.add_argument("name", help="run folder of `rellax train`, in the work folder")

    predict = _command(
        commands,
        "predict",
        _predict,
        "probabilities for users and items: a table, or JSON lines from standard input",
        "rellax predict rella new.csv --out scored.parquet\n"
        """echo '{"user_id": 7, "item_id": 50}' | rellax predict rella""",
    )
    predict.add_argument("name", help="run folder of `rellax train`, in the work folder")
    predict.add_argument(
        "table",
        nargs="?",
        default="-",
        help=".csv, .parquet or .jsonl with user_id, item_id, maybe time; -: JSON lines from standard input",
    )
    predict.add_argument(
        "--out", default="-", help=".csv or .parquet for a table, .jsonl for JSON lines; -: standard output"
    )
    predict.add_argument("--columns", type=Path, help="column map of your own data, docs/own-data.md")
    predict.add_argument("--data", type=Path, help="folder of `rellax prepare` (default: the run's)")
    predict.add_argument(
        "--errors", default="stop", choices=("stop", "answer"), help="what follows from a row that is wrong"
    )
    predict.add_argument("--batch-size", type=int, default=16, help="prompts at once, at most")
    predict.add_argument(
        "--no-calibration",
        dest="calibrated",
        action="store_false",
        help="without the temperature of `rellax calibrate`",
    )

    export = _command(
        commands,
        "export-peft",
        _export_peft,
        "a training run's LoRA for PEFT, without gates and soft prompt",
        "rellax export-peft rella peft-adapter",
    )
    export.add_argument("name", help="run folder of `rellax train`, in the work folder")
    export.add_argument("out", type=Path, help="folder to write")

    report = _command(
        commands,
        "report",
        _report,
        "a page about runs to look at and pass on: one HTML file",
        "rellax report rella rellax crm\nrellax report rella rellax --baseline rella --out rellax.html",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folders, in the work folder")
    report.add_argument("--out", type=Path, help="file to write (default: report.html in the work folder)")
    report.add_argument("--split", default="test", choices=["train", "valid", "test"], help="what is scored")
    report.add_argument(
        "--baseline", metavar="RUN", help="run that others are compared with (default: first)"
    )
    report.add_argument(
        "--seed", type=int, default=0, help="of resamplings and of the samples that are shown"
    )

    doctor = _command(
        commands,
        "doctor",
        _doctor,
        "what this machine has, which backend each operator uses, and a self-test",
        "rellax doctor\nrellax doctor --json > machine.json",
    )
    doctor.add_argument("--json", action="store_true", help="for programs")
    return parser


def _command(commands: Any, name: str, run: Any, summary: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=_examples(examples),
        formatter_class=_Formatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    if name not in ("prepare", "calibrate", "export-peft", "report", "doctor"):
        parser.add_argument("--device", default="auto", choices=_CHOICES["device"], help="where models run")
    if name in ("crm", "embed", "retrieve", "train"):
        parser.add_argument("--redo", action="store_true", help="begin anew, in place of an earlier run")
    if name in ("embed", "retrieve"):
        parser.add_argument("--ray", action="store_true", help="on the cluster of Ray that RAY_ADDRESS names")
        parser.add_argument("--workers", type=int, help="with --ray (default: one for each GPU, or node)")
    if name not in ("demo", "reproduce", "doctor"):
        parser.add_argument("--work", type=Path, default=_WORK, help="work folder, where all folders are")
    if name in ("embed", "train", "evaluate"):
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
            options |= {"nargs": "+", "type": types[kind], "metavar": "N" if kind == "int" else "NAME"}
        else:
            options |= {"type": types[annotation], "choices": _CHOICES.get(field.name)}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options)


if __name__ == "__main__":
    sys.exit(main())
