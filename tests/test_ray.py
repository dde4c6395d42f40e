"""The same jobs on a local Ray of two workers: the same files, whatever happens to a worker."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from workspace import Workspace

from rellax import subr
from rellax.ctr import buckets, cli, embedding, jobs
from rellax.errors import InputError


@pytest.fixture(scope="module")
def ray_of_two() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=2,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            logging_level="ERROR",
        )
        yield
        ray.shutdown()


def kill_a_worker(monkeypatch: pytest.MonkeyPatch, folder: Path, doomed: int) -> None:
    """The process that is first asked for the job `doomed` is killed; `folder` gets notes of who did what."""
    original = jobs.run
    monkeypatch.setattr(
        jobs, "run", lambda worker, *rest: original(_mortal(worker, str(folder), doomed), *rest)
    )
    folder.mkdir()


def _mortal(worker: Any, notes: str, doomed: int) -> Any:
    class Mortal(worker):  # defined in a function, so that it travels by value
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            folder = Path(notes)
            (folder / f"job-{row['job']}-pid-{os.getpid()}").touch()
            if row["job"] == doomed and not (folder / "died").exists():
                (folder / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(row)

    return Mortal


def workers(folder: Path) -> set[str]:
    return {path.name.split("-pid-")[1] for path in folder.glob("job-*")}


def test_retrieval_on_ray_loses_nothing_with_a_worker(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_of_two: None
) -> None:
    monkeypatch.setattr(buckets, "_ROWS", 20)
    for name in ("here", "ray"):
        (tmp_path / name).mkdir()
        for folder in (workspace.data, workspace.embeddings):
            (tmp_path / name / folder.name).symlink_to(folder)
    assert cli.main(["retrieve", "--work", str(tmp_path / "here"), "--k", "3"]) == 0
    heaviest = buckets.Buckets.load(workspace.data, tmp_path / "sizes").longest_first()[0]
    kill_a_worker(monkeypatch, tmp_path / "notes", heaviest)
    command = ["retrieve", "--work", str(tmp_path / "ray"), "--k", "3", "--ray", "--workers", "2"]
    assert cli.main(command) == 0
    one, two = (pq.read_table(tmp_path / name / "retrieved/retrieved.parquet") for name in ("here", "ray"))
    assert two.equals(one)
    assert (tmp_path / "notes" / "died").exists()
    assert len(workers(tmp_path / "notes")) >= 2
    assert len(list((tmp_path / "notes").glob(f"job-{heaviest}-*"))) >= 2  # it was done again by another
    assert not list((tmp_path / "ray").glob(".*"))


def test_embedding_on_ray_loses_nothing_with_a_worker(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_of_two: None
) -> None:
    monkeypatch.setattr(embedding, "_BLOCK_ITEMS", 9)
    config = {"data": str(workspace.data), "model": str(workspace.model), "dim": 4}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as a worker has: the products of PyTorch round by that
    try:
        embedding.embed(config, tmp_path / "here", device="cpu", progress=False)
        kill_a_worker(monkeypatch, tmp_path / "notes", 1)
        embedding.embed(
            config, tmp_path / "ray", device="cpu", cluster=jobs.Cluster(2, gpu=False), progress=False
        )
    finally:
        torch.set_num_threads(threads)
    one, two = (subr.load_embeddings(tmp_path / name) for name in ("here", "ray"))
    assert two.equal(one)
    assert (tmp_path / "notes" / "died").exists()
    assert len(list((tmp_path / "notes").glob("job-1-*"))) >= 2


def test_a_worker_s_errors_arrive_as_they_are(ray_of_two: None) -> None:
    class Refusing:
        def __init__(self, what: str) -> None:
            if what == "this":
                raise InputError(f"what: expected another, got {what}")

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            raise OSError(errno.ENOSPC, "No space left on device", f"{row['job']}.parquet")

    with pytest.raises(InputError, match=r"^what: expected another, got this$"):
        list(jobs.run(Refusing, ("this",), [7], jobs.Cluster(1)))
    with pytest.raises(OSError, match=r"No space left on device: '7.parquet'") as caught:
        list(jobs.run(Refusing, ("that",), [7], jobs.Cluster(1)))
    assert caught.value.errno == errno.ENOSPC
    assert list(jobs.run(Refusing, ("this",), [], jobs.Cluster(1))) == []


@pytest.mark.parametrize(
    ("nodes", "cluster", "workers", "cpus", "gpus"),
    [
        ([{"CPU": 16, "GPU": 4}, {"CPU": 16, "GPU": 4}], {}, 8, 4, 1),
        ([{"CPU": 16, "GPU": 4}, {"CPU": 16, "GPU": 4}], {"gpu": False}, 2, 16, 0),
        ([{}, {"CPU": 64}, {"CPU": 16}], {}, 2, 16, 0),
        ([{"CPU": 2}], {"workers": 2}, 2, 1, 0),
        ([{"CPU": 2, "GPU": 1}], {"workers": 4}, 4, 1, 0.25),
    ],
)
def test_workers_fit_the_cluster(
    nodes: list[dict[str, int]], cluster: dict[str, Any], workers: int, cpus: int, gpus: float
) -> None:
    class Ray:
        @staticmethod
        def nodes() -> list[dict[str, Any]]:
            return [
                {"Alive": False, "Resources": {"CPU": 1}},
                *({"Alive": True, "Resources": n} for n in nodes),
            ]

        @staticmethod
        def cluster_resources() -> dict[str, int]:
            return {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}

    found = jobs._resources(Ray, jobs.Cluster(**cluster))
    assert found == (workers, {"num_cpus": cpus, "num_gpus": gpus})


def test_without_ray_one_sentence_says_so(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["retrieve", "--ray", "--work", str(workspace.root)]
    assert cli.main([*command, "--redo", "--k", "4"]) == 2
    assert "ray: expected the packages of `pip install 'rellax[ray]'`, found none" in capsys.readouterr().err
    assert not list(workspace.root.glob(".retrieved*"))


def test_workers_are_ray_s(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["retrieve", "--work", str(workspace.root), "--workers"]
    assert cli.main([*command, "2"]) == 2
    assert "workers: only with --ray" in capsys.readouterr().err
    assert cli.main([*command, "0", "--ray"]) == 2
    assert "workers: expected a positive number, got 0" in capsys.readouterr().err
