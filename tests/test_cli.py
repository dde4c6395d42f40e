"""The command line: the whole path in small, and one sentence with exit code 2 for whatever is wrong."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from raw_data import random_interactions, write_ml_100k
from workspace import ITEMS, PER_USER, USERS, Workspace, make_model

import rellax
from rellax.ctr import cli, crm
from rellax.ctr.config import CRMConfig, TrainConfig
from rellax.ctr.dataset import Dataset
from rellax.ctr.options import CRM_HELP, TRAIN_HELP, make_parser

SMALL = ["--k", "2", "--dtype", "float32"]
TRAINED = [*SMALL, "--shots", "6", "--validation-samples", "12", "--batch-size", "4", "--r", "2"]


@pytest.fixture(scope="module")
def work(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with everything but training runs."""
    work = tmp_path_factory.mktemp("work")
    for name in ("data", "crm", "embeddings", "retrieved", "model"):
        shutil.copytree(workspace.root / name, work / name)
    config = work / "retrieved" / "config.json"
    config.write_text(config.read_text().replace(str(workspace.root), str(work)))
    return work


@pytest.fixture
def copy(work: Path, tmp_path: Path) -> Path:
    """A copy of `work` that may be spoilt."""
    return shutil.copytree(work, tmp_path / "work")


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run a command that must end with exit code 2 and one sentence; returns it."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    sentence = err.strip().splitlines()[-1]
    assert out == ""
    assert sentence.startswith("rellax: error: ")
    assert "Traceback" not in err
    return sentence.removeprefix("rellax: error: ")


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_the_whole_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interactions = random_interactions(USERS, ITEMS, PER_USER, seed=1)
    raw = write_ml_100k(tmp_path / "raw", interactions, USERS, ITEMS)
    work = ["--work", str(tmp_path / "work"), "--threads", "1"]
    assert cli.main(["prepare", "--raw", str(raw), *work]) == 0
    make_model(tmp_path / "model", Dataset.load(tmp_path / "work" / "data"))
    model = ["--model", str(tmp_path / "model")]
    assert cli.main(["crm", *work]) == 0
    assert cli.main(["embed", "--dim", "5", *model, *work]) == 0
    assert cli.main(["retrieve", "--k", "3", *work]) == 0
    zero = ["evaluate", "zero", "--zero-shot", "--prompts", "recent", "--batch-size", "3"]
    assert cli.main([*zero, *SMALL, *model, *work]) == 0
    assert cli.main(["train", "rella", *TRAINED, *model, *work]) == 0
    stage_2 = ["--stage", "2", "--from", "rella", "--interaction", "full", "--soft-prompt"]
    assert cli.main(["train", "rellax", *stage_2, *TRAINED, *model, *work]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", "rellax", "--samples", "10", "--batch-size", "4", *work]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "new.csv").write_text("user_id,item_id\n3,4\n5,17\n")
    out = tmp_path / "out.csv"
    assert cli.main(["predict", "rellax", str(tmp_path / "new.csv"), "--out", str(out), *work]) == 0

    result = json.loads((tmp_path / "work" / "rellax" / "test" / "metrics.json").read_text())
    assert shown.splitlines()[0].startswith(f"auc       {result['auc']:.4f}")
    assert out.read_text().count("\n") == 3
    for run, size in (("zero", 3), ("rellax", 4)):
        scored = json.loads((tmp_path / "work" / run / "test" / "config.json").read_text())
        assert scored["run"]["eval_batch_size"] == size
    for run in ("crm", "rella", "rellax"):
        names = {"config.json", "environment.json", "metrics.json", "predictions.parquet", "curves.png"}
        assert names <= {path.name for path in (tmp_path / "work" / run).iterdir()}
    assert not [path for path in files(tmp_path) if path.name.startswith(".")]


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(commands.choices)


def examples(parser: argparse.ArgumentParser) -> list[str]:
    """The command lines that a help text ends with."""
    assert parser.epilog is not None
    title, *lines = parser.epilog.splitlines()
    assert title == "examples:"
    return [line.strip() for line in lines]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], *([name] for name in subparsers(make_parser()))):
        with pytest.raises(SystemExit, match="0"):
            cli.main([*command, "--help"])
        shown = capsys.readouterr().out
        assert f"examples:\n  {' '.join(['rellax', *command])}" in shown
        assert not any(f"(default: {value})" in shown for value in (None, True, False))
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"rellax {rellax.__version__}\n"


def test_every_option_is_explained_and_every_example_is_a_command() -> None:
    parser = make_parser()
    commands = subparsers(parser)
    assert list(commands) == list(cli._COMMANDS)
    for name, command in commands.items():
        unexplained = [action.dest for action in command._actions if not action.help]
        assert not unexplained, name
        assert examples(command), name
    for line in (line for one in (parser, *commands.values()) for line in examples(one)):
        words = shlex.split(line, comments=True)
        if words[0] != "rellax":  # run as a module by torchrun or accelerate, or reading what another prints
            words = words[words.index("-m" if "-m" in words else "|") + 1 :]
        assert words[0] == "rellax"
        parser.parse_args(words[1 : words.index(">") if ">" in words else None])


def test_every_field_is_an_option() -> None:
    folders = {"data", "model", "crm", "retrieved", "start"}
    assert {field.name for field in fields(TrainConfig)} - folders == set(TRAIN_HELP)
    assert {field.name for field in fields(CRMConfig)} == set(CRM_HELP)


def test_options_of_the_classical_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[CRMConfig] = []
    monkeypatch.setattr(crm, "make_crm", lambda _, folder, config, **options: made.append(config))
    work = ["--work", str(tmp_path)]
    assert cli.main(["crm", *work]) == 0
    words = "--model SIM --max-len 100 --hidden 32 16 --lr 0.01 --batch-size 256 --user-id"
    assert cli.main(["crm", "sim", *words.split(), *work]) == 0
    given = {"max_len": 100, "hidden": (32, 16), "lr": 0.01, "batch_size": 256, "user_id": True}
    assert made == [CRMConfig(), CRMConfig(model="SIM", **given)]


def test_options_of_prepare(tmp_path: Path) -> None:
    raw = write_ml_100k(tmp_path / "raw", random_interactions(5, 20, 12, seed=0), 5, 20)
    words = ["--raw", str(raw), "--work", str(tmp_path), "--min-history", "9", "--split", "1", "1", "3"]
    assert cli.main(["prepare", *words]) == 0
    dataset = Dataset.load(tmp_path / "data")
    assert dataset.samples.position.min() == dataset.meta["min_history"] == 9
    assert [len(dataset.indices(split)) for split in ("train", "valid", "test")] == [3, 3, 9]


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import rellax, sys; from rellax.ctr import cli; cli.make_parser(); "
        "heavy = ('fuxictr', 'matplotlib', 'accelerate', 'pyarrow', 'sklearn', 'peft', 'torch._dynamo'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fill(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/log.jsonl")

    monkeypatch.setitem(cli._COMMANDS, "train", fill)
    assert "No space left on device: 'runs/x/log.jsonl'" in fails(capsys, ["train", "x"])


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        ("train x", "a smaller --micro-batch-size or --eval-batch-size takes less"),
        ("evaluate x", "a smaller --batch-size takes less"),
        ("embed", "--device cpu has the machine's"),
    ],
)
def test_too_little_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, advice: str
) -> None:
    def fill(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")

    name, *_ = words = command.split()
    monkeypatch.setitem(cli._COMMANDS, name, fill)
    found = "device: expected enough memory, found too little (CUDA out of memory. Tried to allocate"
    sentence = fails(capsys, words)
    assert sentence.startswith(found)
    assert sentence.endswith(f"GPU 0 has); {advice}")


def test_options_that_say_what_takes_less_memory_exist() -> None:
    commands = subparsers(make_parser())
    for name, options in cli._FEWER_AT_ONCE.items():
        known = {option for action in commands[name]._actions for option in action.option_strings}
        assert known >= {word for word in options.split() if word.startswith("--")}


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x")

    monkeypatch.setitem(cli._COMMANDS, "train", lose)
    with pytest.raises(FileNotFoundError):
        cli.main(["train", "x"])


def test_a_package_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lack(_: object) -> None:
        importlib.import_module("no_such_package.part")

    monkeypatch.setitem(cli._COMMANDS, "crm", lack)
    assert fails(capsys, ["crm"]).startswith(
        "no_such_package: expected this package, found none; `pip install"
    )


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, "train", stop)
    assert cli.main(["train", "x"]) == 130
    assert capsys.readouterr().err == "\nrellax: stopped; the same command goes on from where it was\n"
    monkeypatch.setitem(cli._COMMANDS, "crm", stop)
    assert cli.main(["crm"]) == 130
    assert capsys.readouterr().err == "\nrellax: stopped; the same command begins anew\n"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda raw: (raw / "ml-100k.user").unlink(), "ml-100k.user: expected this file, found none"),
        (
            lambda raw: edit(raw / "ml-100k.inter", "rating:float", "stars:float"),
            "line 1: expected a column 'rating:float'",
        ),
        (
            lambda raw: append(raw / "ml-100k.inter", "1\t999\t3\t5"),
            "item '999' is not in the table of items",
        ),
        (lambda raw: append(raw / "ml-100k.inter", "99\t1\t3\t5"), "user '99' is not in the table of users"),
        (lambda raw: append(raw / "ml-100k.inter", "1\t1\t6\t5"), "expected a rating from 1 to 5, found 6"),
        (lambda raw: keep(raw / "ml-100k.inter", 8), "split 'train' is empty"),
    ],
    ids=["missing-file", "wrong-column", "unknown-item", "unknown-user", "rating", "empty-split"],
)
def test_bad_raw_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], words: str
) -> None:
    raw = write_ml_100k(tmp_path / "raw", random_interactions(5, 20, 12, seed=0), 5, 20)
    spoil(raw)
    before = files(tmp_path)
    assert words in fails(capsys, ["prepare", "--raw", str(raw), "--work", str(tmp_path / "work")])
    assert files(tmp_path) - before <= {tmp_path / "work"}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["train", "x"], "data/samples.parquet: expected this file, found none; `rellax prepare` makes it"),
        (["evaluate", "x"], "x/config.json: expected a JSON file, found none; `rellax train` makes it"),
        (["retrieve"], "data/dataset.json: expected a JSON file, found none; `rellax prepare` makes it"),
        (["crm"], "data/dataset.json: expected a JSON file, found none; `rellax prepare` makes it"),
        (["embed"], "data/dataset.json: expected a JSON file, found none; `rellax prepare` makes it"),
        (["predict", "x", "y.csv", "--out", "z.csv"], "y.csv: expected a table, found none"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_missing_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workspace: Workspace, command: list[str], words: str
) -> None:
    model = ["--model", str(workspace.model)] if command[0] in ("train", "embed") else []
    assert words in fails(capsys, [*command, *model, "--work", str(tmp_path / "work")])
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda work: cut(work / "crm/outputs.safetensors"), "outputs.safetensors: expected the outputs"),
        (lambda work: cut(work / "model/model.safetensors"), "model: expected a folder with a causal"),
        (
            lambda work: cut(work / "retrieved/retrieved.parquet"),
            "retrieved.parquet: expected a Parquet file",
        ),
        (lambda work: cut(work / "data/behaviours.parquet"), "behaviours.parquet: expected Parquet"),
        (lambda work: drop(work / "data/samples.parquet", "label"), "expected column 'label'"),
        (
            lambda work: keep_rows(work / "retrieved/retrieved.parquet", 9),
            "retrieved.parquet: expected the 120",
        ),
    ],
    ids=["crm", "model", "retrieved", "behaviours", "samples", "fewer-samples"],
)
def test_damaged_files(
    copy: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], words: str
) -> None:
    spoil(copy)
    before = files(copy)
    joint = ["--stage", "joint", "--interaction", "full", "--soft-prompt"]
    command = ["train", "run", "--work", str(copy), "--model", str(copy / "model"), *TRAINED, *joint]
    assert words in fails(capsys, command)
    assert files(copy) == before


def test_adapters_that_do_not_fit(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = ["--work", str(copy)]
    assert cli.main(["train", "run", *work, "--model", str(copy / "model"), *TRAINED]) == 0
    make_model(copy / "other", Dataset.load(copy / "data"), hidden_size=24)
    edit(copy / "run" / "config.json", str(copy / "model"), str(copy / "other"))
    before = files(copy)
    sentence = fails(capsys, ["evaluate", "run", *work])
    assert sentence.startswith("adapter: expected one of")
    assert sentence.index("'hidden_size': 24") < sentence.index("'hidden_size': 16")
    stage_2 = ["--stage", "2", "--from", "run", "--interaction", "full", "--model", str(copy / "model")]
    assert "start: expected an adapter of" in fails(capsys, ["train", "two", *work, *TRAINED, *stage_2])
    edit(copy / "run" / "config.json", str(copy / "other"), str(copy / "model"))
    cut(copy / "run" / "adapter" / "adapter.safetensors")
    assert "adapter.safetensors: damaged" in fails(capsys, ["evaluate", "run", *work])
    assert files(copy) == before


def test_no_network(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELLAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    assert "pip could not download it" in fails(capsys, ["prepare", "--work", str(tmp_path / "work")])
    assert "pip could not download it" in fails(capsys, ["demo", "--out", str(tmp_path / "demo")])
    assert not (tmp_path / "work").exists()
    assert not (tmp_path / "demo").exists()


def test_a_model_that_is_nowhere(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "run", "--work", str(work), "--model", "no-one/no-such-model", *TRAINED]
    assert "got 'no-one/no-such-model'" in fails(capsys, command)


def test_bad_options(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "run", "--work", str(work), "--model", str(work / "model")]
    assert "so the gates would get no gradient" in fails(
        capsys, [*train, "--stage", "2", "--interaction", "full"]
    )
    assert "expected a positive number, got 0" in fails(capsys, [*train, "--threads", "0"])
    assert "got 'cuda' without a CUDA device" in fails(capsys, [*train, *TRAINED, "--device", "cuda"])
    evaluate = ["evaluate", "run", "--work", str(work), "--k", "3"]
    assert "k: only with --zero-shot" in fails(capsys, evaluate)
    with pytest.raises(SystemExit, match="2"):
        cli.main([*train, "--stage", "3"])


@pytest.mark.parametrize("run", ["crm", "rella"])
def test_the_untrained_models_predictions_are_no_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run: str
) -> None:
    (tmp_path / run).mkdir()
    (tmp_path / run / "config.json").write_text("{}")
    before = files(tmp_path)
    command = ["evaluate", run, "--zero-shot", "--work", str(tmp_path), "--model", str(tmp_path / "model")]
    words = "name: expected a new name for the untrained model's predictions, got that of a trained run, "
    assert fails(capsys, command) == f"{words}{run!r}"
    assert files(tmp_path) == before


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def append(path: Path, line: str) -> None:
    path.write_text(path.read_text() + line + "\n")


def keep(path: Path, lines: int) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop(path: Path, column: str) -> None:
    pq.write_table(pq.read_table(path).drop_columns([column]), path)


def keep_rows(path: Path, rows: int) -> None:
    table: pa.Table = pq.read_table(path)
    pq.write_table(table.slice(0, rows), path)


@pytest.mark.parametrize(
    "name", ["../elsewhere", "/tmp/elsewhere", "a/../../b", ".", "", "retrieved", "data/x"]
)
def test_a_run_stays_in_the_work_folder(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = ["--work", str(tmp_path / "work")]
    for command in (["train", name, "--redo"], ["evaluate", name], ["crm", name]):
        assert cli.main([*command, *work]) == 2
        assert "expected the name of a run in the work folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train run --seed -1", "seed: expected a whole number from 0 on, got -1"),
        ("reproduce --seeds 0 -3", "seed: expected a whole number from 0 on, got -3"),
        ("retrieve --k -3", "k: expected a whole number, at least 1 and less than 2^31, got -3"),
        ("embed --dim 0", "dim: expected a whole number, at least 1 and less than 2^31, got 0"),
        ("evaluate run --model gpt", "model: only with --zero-shot, a training run has its own"),
        ("reproduce --data here --raw there", "raw: expected either --data or --raw, got both"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    command: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ["--out" if command.startswith("reproduce") else "--work", str(tmp_path / "work")]
    assert cli.main([*command.split(), *folder]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
