"""Jobs that each leave a file: run here one after another, or by the actors of Ray Data on a cluster.

A job is done when its file is there, so whatever is stopped or killed goes on with what is missing. What runs
where, and what runs again when a worker is lost, is Ray's business.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rellax._files import read_json, write_json
from rellax.ctr.runs import locked
from rellax.errors import InputError

Row = dict[str, Any]
_ERROR = "error"


class Worker(Protocol):
    """Made once in each process with what the jobs share; called with {"job": number}, returns a row."""

    def __call__(self, row: Row) -> Row: ...


@dataclass(frozen=True)
class Cluster:
    """Ray, as it is initialised, or as `ray.init()` finds or starts it.

    Attributes:
        workers: actors; None is one for each GPU, or, where there is none, for each node.
        gpu: they use GPUs where the cluster has them.

    Raises:
        InputError: not a positive number of workers, or Ray is not installed.
    """

    workers: int | None = None
    gpu: bool = True

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise InputError(f"workers: expected a positive number, got {self.workers}")
        import_ray()


@contextlib.contextmanager
def parts_folder(folder: str | Path, plan: Row) -> Iterator[Path]:
    """The hidden folder beside `folder` that keeps the parts of unfinished work; empty for a new `plan`.

    It goes when the work is done, and no other process works in either folder meanwhile.

    Raises:
        InputError: another process does so now.
    """
    path = Path(folder).resolve().parent / f".{Path(folder).name}.parts"
    marker, plan = path / "plan.json", json.loads(json.dumps(plan))
    with locked(folder), locked(path):  # the result takes the place of `folder`, and so of its lock
        if not marker.exists() or read_json(marker) != plan:
            for part in path.iterdir():
                shutil.rmtree(part) if part.is_dir() else part.unlink()
            write_json(marker, plan)
        yield path
        shutil.rmtree(path)


def run(
    worker: type[Worker], arguments: tuple[Any, ...], jobs: Sequence[int], cluster: Cluster | None = None
) -> Iterator[Row]:
    """The rows of `worker(*arguments)` for each job, as they come.

    Workers may run elsewhere: paths among `arguments` have to be absolute.

    Raises:
        InputError: a job's; and OSError.
    """
    if cluster is None or not jobs:
        call = worker(*arguments) if jobs else None
        return (call({"job": job}) for job in jobs if call is not None)
    return _run_on_ray(worker, arguments, jobs, cluster)


def _run_on_ray(
    worker: type[Worker], arguments: tuple[Any, ...], jobs: Sequence[int], cluster: Cluster
) -> Iterator[Row]:
    ray = import_ray()
    from ray.data import ActorPoolStrategy, DataContext

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    started_here = not ray.is_initialized()
    if started_here:
        ray.init()
    try:
        DataContext.get_current().enable_progress_bars = False
        workers, resources = _resources(ray, cluster)
        pool = ActorPoolStrategy(size=min(workers, len(jobs)), max_tasks_in_flight_per_actor=1)
        rows = ray.data.from_items([{"job": job} for job in jobs], override_num_blocks=len(jobs))
        rows = rows.map(_Actor, fn_constructor_args=(worker, arguments), compute=pool, **resources)
        for row in rows.iter_rows():
            if _ERROR in row:
                raise _unpacked(row[_ERROR])
            yield row
    finally:
        if started_here:
            ray.shutdown()


class _Actor:
    """A worker whose errors are rows, where a user can mend them: Ray would make a traceback of them."""

    def __init__(self, worker: type[Worker], arguments: tuple[Any, ...]) -> None:
        self.make = worker, arguments
        self.worker: Worker | None = None

    def __call__(self, row: Row) -> Row:
        try:
            if self.worker is None:
                worker, arguments = self.make
                self.worker = worker(*arguments)
            return self.worker(row)
        except (InputError, OSError) as error:
            return {_ERROR: _packed(error)}


def _packed(error: InputError | OSError) -> str:
    place = None if isinstance(error, InputError) else [error.errno, error.strerror, error.filename]
    return json.dumps([str(error), place], default=str)


def _unpacked(text: str) -> InputError | OSError:
    message, place = json.loads(text)
    return InputError(message) if place is None else OSError(*place)


def import_ray() -> Any:
    """The module ray.

    Raises:
        InputError: it is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError(
            f"ray: expected the packages of `pip install 'rellax[ray]'`, found none ({error})"
        ) from None
    return ray


def _resources(ray: Any, cluster: Cluster) -> tuple[int, Row]:
    """Number of workers, and what each of them takes."""
    total = ray.cluster_resources()
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    nodes = [cpus for cpus in nodes if cpus]
    gpus = int(total.get("GPU", 0)) if cluster.gpu else 0
    workers = cluster.workers or gpus or len(nodes)
    cpus = max(1, min(*nodes, sum(nodes) // workers))
    return workers, {"num_cpus": cpus, "num_gpus": min(1.0, gpus / workers)}
