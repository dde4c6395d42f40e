"""The command `rellax`: what each command does. They import what they need when they run: --help is quick."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rellax.ctr.config import CRMConfig, DemoConfig, StudyConfig, TrainConfig
from rellax.ctr.options import CRM_HELP, DEMO_HELP, PROMPT_FIELDS, STUDY_HELP, TRAIN_HELP, make_parser
from rellax.ctr.stopping import Terminated, stoppable
from rellax.errors import InputError, one_line

if TYPE_CHECKING:
    from rellax.ctr.jobs import Cluster

_RESUMED = ("demo", "reproduce", "embed", "retrieve", "train", "evaluate")
_MACHINE_SAYS_NO = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
)
_FEWER_AT_ONCE = {  # options by which a command takes less memory
    **dict.fromkeys(("demo", "reproduce", "train"), "--micro-batch-size or --eval-batch-size"),
    **dict.fromkeys(("crm", "evaluate", "predict"), "--batch-size"),
}
_FOLDERS = ("data", "embeddings", "retrieved")  # of the work folder, that are no runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns 0; 1 where `doctor` found a fault; 2 for bad input, a disk that is full or locked, a GPU with too
    little memory, or a package that is missing; 130 after Ctrl-C, 143 after SIGTERM.
    """
    options = make_parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("rellax").setLevel(logging.INFO)
    try:
        if options.threads is not None:
            _set_threads(options.threads)
        _check_run_name(options)
        _check_seeds(options)
        with stoppable():
            return _COMMANDS[options.command](options) or 0
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
    except torch.OutOfMemoryError as error:
        fewer = _FEWER_AT_ONCE.get(options.command)
        advice = "--device cpu has the machine's" if fewer is None else f"a smaller {fewer} takes less"
        found = f"found too little ({one_line(error)})"
        print(f"rellax: error: device: expected enough memory, {found}; {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        then = "goes on from where it was" if options.command in _RESUMED else "begins anew"
        print(f"\nrellax: stopped; the same command {then}", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130


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
    folder, names = options.work / "data", ("min_history", "split", "strictly_before")
    meta = prepare(source, folder, **{name: getattr(options, name) for name in names})
    print(f"{folder}: {summary(meta)}")


def _fetched(name: str) -> Path:
    if name == "ml-100k":
        from rellax.ctr.assets import movielens_100k

        return movielens_100k()
    from rellax.ctr.downloads import published

    return published(name)


def _crm(options: argparse.Namespace) -> None:
    from rellax.ctr.crm import make_crm

    folder = options.work / options.name
    config = CRMConfig(**{name: getattr(options, name) for name in CRM_HELP})
    make_crm(options.work / "data", folder, config, **_run_options(options))
    print(folder)


def _embed(options: argparse.Namespace) -> None:
    from rellax.ctr.embedding import embed

    config = {"data": str(options.work / "data"), "model": _model(options), "dim": options.dim}
    config |= {"crm": str(options.work / options.crm)} if options.crm is not None else {}
    embed(config, options.work / "embeddings", cluster=_cluster(options), **_run_options(options))
    print(options.work / "embeddings")


def _retrieve(options: argparse.Namespace) -> None:
    from rellax.ctr.retrieval import retrieve

    config: dict[str, Any] = {name: str(options.work / name) for name in ("data", "embeddings")}
    config |= {"k": options.k} | ({"scores": True} if options.scores else {})
    retrieve(config, options.work / "retrieved", cluster=_cluster(options), **_run_options(options))
    print(options.work / "retrieved")


def _train(options: argparse.Namespace) -> None:
    from rellax.ctr import parallel
    from rellax.ctr.config import INHERITED, inherited
    from rellax.ctr.train import train

    folder, config = options.work / options.name, _train_config(options, start=_start(options))
    given = [name for name in INHERITED if getattr(config, name) != getattr(TrainConfig, name)]
    taken = inherited(config) if given else config
    for name in given:
        got, expected = getattr(config, name), getattr(taken, name)
        if got != expected:
            raise InputError(
                f"{name}: expected {expected}, as in {config.start}, which it starts from, got {got}"
            )
    result = train(
        config,
        folder,
        fsdp=options.fsdp,
        tensorboard=options.tensorboard,
        **_run_options(options),
    )
    print(f"{folder}: step {result['best_step']} of {result['steps']} is kept")
    parallel.leave()


def _start(options: argparse.Namespace) -> str | None:
    """What --from names: a run in the work folder, or else any folder."""
    if options.start is None:
        return None
    run = options.work / options.start
    return str(options.start if not run.exists() and Path(options.start).exists() else run)


def _evaluate(options: argparse.Namespace) -> None:
    from rellax.ctr.evaluate import evaluate, evaluate_zero_shot

    folder = options.work / options.name
    sizes = {name: getattr(options, name) for name in ("split", "samples", "seed", "device")}
    given = [name for name in PROMPT_FIELDS if hasattr(options, name)]
    if options.zero_shot:
        if (folder / "config.json").exists():
            raise InputError(
                "name: expected a new name for the untrained model's predictions, got that of a trained run, "
                f"{options.name!r}"
            )
        result = evaluate_zero_shot(_train_config(options), folder / options.split, **sizes)
    elif given:
        raise InputError(f"{given[0]}: only with --zero-shot, a training run is scored with its own prompts")
    elif options.model is not None:
        raise InputError("model: only with --zero-shot, a training run has its own")
    else:
        result = evaluate(folder, batch_size=options.eval_batch_size, **sizes)
    for key in ("auc", "gauc", "log_loss", "acc", "ece"):
        low_high = result.get(f"{key}_interval")
        interval = "" if low_high is None else f"  [{low_high[0]:.4f}, {low_high[1]:.4f}]"
        print(f"{key:9} " + ("-" if result[key] is None else f"{result[key]:.4f}{interval}"))
    for key, value in result.get("calibrated", {}).items():
        if key in ("auc", "log_loss", "ece"):
            print(f"{f'calibrated {key}':20} {value:.4f}")
        elif not key.endswith("_interval"):
            print(f"{key:20} {value if key == 'crm' else f'{value:.4f}'}")


def _calibrate(options: argparse.Namespace) -> None:
    from rellax.ctr.evaluate import calibrate

    crm = None if options.crm is None else options.work / options.crm
    result = calibrate(options.work / options.name, crm=crm)
    if crm is None:
        found = f"temperature {result['temperature']:.4f}"
    else:
        both = f"{result['weight']:.4f} of its log-odds, {result['crm_weight']:.4f} of those of {options.crm}"
        found = f"{both}, and {result['bias']:+.4f}"
    print(f"{found}, fitted on {result['samples']:,} validation samples:")
    for key in ("ece", "log_loss") if crm is None else ("auc", "ece", "log_loss"):
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

    config = DemoConfig(**{name: getattr(options, name) for name in DEMO_HELP})
    print(demo(config, options.out, device=options.device))
    print(f"\nThe report is {options.out / 'report.md'}")


def _reproduce(options: argparse.Namespace) -> None:
    from rellax.ctr.study import reproduce

    config = StudyConfig(**{name: getattr(options, name) for name in STUDY_HELP})
    if config.data is not None and config.raw is not None:
        raise InputError("raw: expected either --data or --raw, got both")
    only = "plan" if options.plan else "report" if options.report else None
    print(reproduce(config, options.out, device=options.device, only=only, jobs=options.jobs))
    if only != "plan":
        print(f"The report is {options.out / 'report.md'}")


def _train_config(options: argparse.Namespace, **more: Any) -> TrainConfig:
    values = {name: getattr(options, name) for name in TRAIN_HELP if hasattr(options, name)} | more
    prompts = values.get("prompts", TrainConfig.prompts)
    config = TrainConfig(
        data=str(options.work / "data"),
        model=_model(options),
        retrieved=str(options.work / "retrieved") if prompts != "recent" else None,
        crm=str(options.work / options.crm) if hasattr(options, "crm") else None,
        **values,
    )
    return config if config.uses_crm else dataclasses.replace(config, crm=None)


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
    if name is None:
        return
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or path.parts[0] in _FOLDERS:
        raise InputError(
            f"name: expected the name of a run in the work folder, not {', '.join(_FOLDERS)}, got {name!r}"
        )


def _check_seeds(options: argparse.Namespace) -> None:
    for seed in (getattr(options, "seed", None), *(getattr(options, "seeds", None) or ())):
        if seed is not None and seed < 0:
            raise InputError(f"seed: expected a whole number from 0 on, got {seed}")


def _set_threads(threads: int) -> None:
    if threads < 1:
        raise InputError(f"threads: expected a positive number, got {threads}")
    torch.set_num_threads(threads)


_COMMANDS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "demo": _demo,
    "reproduce": _reproduce,
    "prepare": _prepare,
    "crm": _crm,
    "embed": _embed,
    "retrieve": _retrieve,
    "train": _train,
    "evaluate": _evaluate,
    "calibrate": _calibrate,
    "predict": _predict,
    "export-peft": _export_peft,
    "report": _report,
    "doctor": _doctor,
}

if __name__ == "__main__":
    sys.exit(main())
