"""Run folders: what may take the place of what."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import DistilBertConfig, LlamaConfig

from rellax.ctr.config import CRMConfig, StudyConfig, TrainConfig
from rellax.ctr.crm import make_crm
from rellax.ctr.embedding import embed
from rellax.ctr.retrieval import retrieve
from rellax.ctr.runs import is_claimed, locked
from rellax.errors import InputError

RUNS: dict[str, dict[str, Any]] = {
    "crm": asdict(CRMConfig()),
    "embed": {"data": "data", "model": "llm", "dim": 8},
    "retrieve": {"data": "data", "embeddings": "embeddings", "k": 5},
    "train": TrainConfig("data", "llm", prompts="recent").to_json() | {"inputs": {}},
}
OTHERS: dict[str, dict[str, Any]] = {
    "study": asdict(StudyConfig()),
    "share": {"data": "data", "retrieved": None, "k": 5},
    "evaluation": {"run": RUNS["train"], "adapter": None, "inputs": {}, "split": "test"},
    "llama": LlamaConfig().to_dict(),
    "distilbert": DistilBertConfig().to_dict(),
}


def with_config(folder: Path, config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text("{}")
    return folder


def begin_anew(command: str, folder: Path) -> None:
    if command == "crm":
        make_crm("data", folder, CRMConfig(), device="cpu", redo=True)
    elif command == "train":  # tests/test_train.py has the whole command
        is_claimed(folder, RUNS[command], command=command, redo=True)
    else:
        {"embed": embed, "retrieve": retrieve}[command](RUNS[command], folder, device="cpu", redo=True)


@pytest.mark.parametrize("kind", [*RUNS, *OTHERS])
@pytest.mark.parametrize("command", RUNS)
def test_only_a_run_of_the_same_command_is_begun_anew(tmp_path: Path, command: str, kind: str) -> None:
    folder = with_config(tmp_path / "run", (RUNS | OTHERS)[kind])
    if kind == command:
        assert not is_claimed(folder, RUNS[command], command=command, redo=True)
        return
    words = f"run: expected a run of `rellax {command}` to begin anew, found another kind"
    with pytest.raises(InputError, match=words):
        begin_anew(command, folder)
    assert len(list(folder.iterdir())) == 2


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    names = (".crm.0123abcd", ".crm.0123abcd.old", ".crm2.0123abcd", ".crm.notes", "crm")
    for name in names:
        (tmp_path / name).mkdir()
    with locked(tmp_path / "crm"):
        pass
    assert (tmp_path / ".crm.0123abcd").exists()  # what was put aside for it may be the only one
    (tmp_path / ".crm.0123abcd.old").rmdir()
    with locked(tmp_path / "crm"):
        assert {path.name for path in tmp_path.iterdir()} == {".crm2.0123abcd", ".crm.notes", "crm"}


def test_changed_inputs_are_named_without_their_hashes(tmp_path: Path) -> None:
    config = {"lr": 1.0, "inputs": {"samples.parquet": "12ab", "items.parquet": "34cd"}}
    folder = with_config(tmp_path / "run", config)
    wanted = {"lr": 2.0, "inputs": {"samples.parquet": "56ef", "items.parquet": "34cd"}}
    with pytest.raises(
        InputError, match=r"run with lr = 1.0, expected 2.0, and other contents of samples.parquet; "
    ):
        is_claimed(folder, wanted)


def test_a_file_of_another_form_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found another kind"):
        begin_anew("crm", with_config(tmp_path / "run", ["embedding_dim", "hidden", "model"]))


@pytest.mark.parametrize(
    ("command", "config"),
    [
        ("crm", {name: value for name, value in RUNS["crm"].items() if name != "regularizer"}),
        ("embed", RUNS["embed"] | {"crm": "crm"}),
        ("retrieve", RUNS["retrieve"] | {"scores": True, "k": 9}),
        ("train", {name: value for name, value in RUNS["train"].items() if name != "recent_share"}),
    ],
)
def test_other_options_and_versions_are_begun_anew(
    tmp_path: Path, command: str, config: dict[str, Any]
) -> None:
    folder = with_config(tmp_path / "run", config)
    assert not is_claimed(folder, RUNS[command], command=command, redo=True)
    with pytest.raises(InputError, match="; choose another folder, or begin anew with --redo"):
        is_claimed(folder, RUNS[command], command=command)
