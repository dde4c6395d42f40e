"""A finished run, loaded once, that answers requests: what a service holds."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rellax._files import read_json, sha256_file
from rellax.ctr.batches import Collator, Example
from rellax.ctr.calibration import Calibration, read_calibration
from rellax.ctr.config import read_config
from rellax.ctr.crm import CRM, WEIGHTS
from rellax.ctr.dataset import WORDING_FILE, Dataset
from rellax.ctr.evaluate import predict_probabilities
from rellax.ctr.llm import resolve_device
from rellax.ctr.requests import Request, Requests
from rellax.ctr.retrieval import EMBEDDINGS, embeddings_folder, find_positions, load_embeddings
from rellax.ctr.stream import Table
from rellax.ctr.task import Examples, Inputs, Task, check_input
from rellax.errors import InputError, shown
from rellax.ops._check import check_count

Row = Mapping[str, Any]
Answer = float | InputError  # what is wrong with the row

_ITEMS = "items.parquet"
_NO_ROWS = (Mapping, str, bytes)
"""What can be gone through but has no rows in it; nor has a data frame, which gives its columns' names."""


class Predictor:
    """Probabilities from a finished run, for any users and items, in any thread.

    All that requests share is loaded here, once: the model, the data, the items' soft rows and embeddings,
    the recommendation model; and the model has run once.

    Threads may call at the same time. A thread of the predictor's own computes; what has been asked for
    meanwhile it takes along, up to `batch_size` rows: a model does more rows a second in a batch. That thread
    ends with the predictor, nothing needs to be closed. A forked process has none, and makes its own.

    Args:
        run: folder of `rellax train`.
        data: folder of `rellax prepare`; None is the one of the run. It may have newer behaviours and users,
            but must have the same items.
        device: "auto", "cpu" or "cuda".
        batch_size: prompts that go through the model at once.
        calibrated: use what `rellax calibrate` found, where the run has it.
        share_batches: whether the rows of several threads go through the model together. It changes their
            probabilities by rounding alone; without it they are the same bits, whatever other threads do.

    Attributes:
        calibration: what becomes of the model's log-odds.
        timed: whether the data have times.

    Raises:
        InputError: the run is not finished, a file of it is missing, damaged, or of other data, its language
            model has other weights now, or the data another wording.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        data: str | Path | None = None,
        device: str = "auto",
        batch_size: int = 16,
        calibrated: bool = True,
        share_batches: bool = True,
    ) -> None:
        check_count("batch_size", batch_size)
        where = resolve_device(device)
        config, inputs = read_config(run), read_json(Path(run) / "config.json")["inputs"]
        dataset = Dataset.load(config.data if data is None else data)
        _check_wording(dataset, Path(run) / WORDING_FILE)
        crm = config.crm if config.interaction != "none" or config.crm_logit else None
        self.batch_size, self.share_batches, self._process = batch_size, share_batches, os.getpid()
        self.timed = bool(dataset.meta["timed"])
        self.calibration = read_calibration(run) if calibrated else Calibration()
        if config.soft_prompt or crm is not None or self.calibration.crm is not None:
            _check_items(dataset, config.data, inputs)
        self._requests = Requests(dataset)
        self._task = Task(config, Inputs(dataset), Path(run) / "adapter", device=where)
        self._embeddings = self._crm = self._beside = None
        if config.evaluation_prompts == "retrieved":
            assert config.retrieved is not None, "TrainConfig asks for it with these prompts"
            check_input(embeddings_folder(config.retrieved) / EMBEDDINGS, inputs)
            self._embeddings = load_embeddings(config.retrieved, dataset).to(where)
        if crm is not None:
            check_input(Path(crm) / WEIGHTS, inputs)
            self._crm = CRM(crm, dataset)
        if (beside := self.calibration.crm) is not None:
            self._beside = self._crm if beside == config.crm and self._crm else CRM(beside, dataset)
        self._waiting: deque[_Job] = deque()
        # First come, first served: where callers took turns with a lock, the slowest waited twice as long.
        self._worker = ThreadPoolExecutor(1, "rellax-predictor")
        self._answers([_any_request(dataset)], None)

    def predict(
        self,
        rows: Iterable[Row],
        *,
        place: Callable[[int], str] = "rows[{}]".format,
        done: Callable[[int], object] | None = None,
    ) -> np.ndarray:
        """The probability of each row, (n,) float64.

        A row has `item_id` and `user_id`, as in the raw data, and may have `time`: its history is then what
        the user did strictly before, else all that is known. Times are numbers in the unit of the raw data,
        whose fraction is cut, or where these were dates, dates. NaN, NaT and NA of pandas' are as None.

        A row may bring a `history`, a list of behaviours with `item_id`, `rating` and, where the data have
        times, `time`. They are added to what is known of the user, who may also be new, or without an id; in
        data without times they are the latest, oldest first. What is known already counts once, behaviours
        of unknown items do not count. Of a new user `user` may tell the `profile`, as prompts put it, and the
        features of the data; for a feature that is not told the CRM reads what most users have.

        Args:
            rows: of mixed users.
            place: what an error calls the row of that number.
            done: told of each batch of rows that is through, how many they were.

        Raises:
            InputError: a row cannot be answered, the first such row is named; `rows` are no rows; or this
                process was forked from the one that made the predictor.
        """
        requests = self._read(rows)
        _raise_first(requests, place)
        answers = self._answers(requests, done)
        _raise_first(answers, place)
        return np.array(answers, dtype=np.float64)

    def predict_each(
        self, rows: Iterable[Row], *, done: Callable[[int], object] | None = None
    ) -> list[Answer]:
        """As `predict`, but a row that cannot be answered gets what is wrong with it for a probability."""
        return self._answers(self._read(rows), done)

    def _read(self, rows: Iterable[Row]) -> list[Request | InputError]:
        if os.getpid() != self._process:  # whose thread is not there after a fork: it would wait for ever
            raise InputError(
                "Predictor: expected the process that made it, found a child of that; make one in each worker"
            )
        if not isinstance(rows, Iterable) or isinstance(rows, _NO_ROWS) or hasattr(rows, "columns"):
            raise InputError(f"rows: expected a list of objects, got {_said(rows)}")
        return [_or_error(self._requests.read, row) for row in rows]

    def _answers(
        self, requests: Sequence[Request | InputError], done: Callable[[int], object] | None
    ) -> list[Answer]:
        good = [request for request in requests if not isinstance(request, InputError)]
        job = _Job(good, done)
        if good:
            self._waiting.append(job)
            self._worker.submit(self._work)
        try:
            answers = iter(job.answers.result() if good else ())
        except BaseException:
            job.answers.cancel()  # after Ctrl-C nobody waits for the rest
            raise
        return [request if isinstance(request, InputError) else next(answers) for request in requests]

    def _work(self) -> None:
        """Answer the oldest job, and with it those that fit into its batch; in the worker's thread."""
        jobs: list[_Job] = []
        while self._waiting:
            rows = sum(len(job.requests) for job in (*jobs, self._waiting[0]))
            if jobs and (rows > self.batch_size or not self.share_batches):
                break
            jobs.append(self._waiting.popleft())
        if not jobs:  # an earlier call has taken along the job that this one was for
            return
        try:
            answers = iter(self._probabilities([request for job in jobs for request in job.requests], jobs))
        except BaseException as error:
            for job in jobs:
                with contextlib.suppress(InvalidStateError):  # cancelled
                    job.answers.set_exception(error)
            return
        for job in jobs:
            found = list(itertools.islice(answers, len(job.requests)))
            with contextlib.suppress(InvalidStateError):
                job.answers.set_result(found)

    def _probabilities(self, requests: Sequence[Request], jobs: Sequence[_Job]) -> list[Answer]:
        def passed(rows: int) -> None:
            if all(job.answers.cancelled() for job in jobs):
                raise CancelledError
            if len(jobs) == 1 and jobs[0].done is not None:
                jobs[0].done(rows)

        prompts, collator, beside = self._prompts(requests)
        rows = [row for row, prompt in enumerate(prompts) if isinstance(prompt, Example)]
        examples = [prompt for prompt in prompts if isinstance(prompt, Example)]
        found = predict_probabilities(
            self._task.model, collator, examples, batch_size=self.batch_size, done=passed
        )
        crm_probabilities = None if beside is None else beside[rows]
        probabilities = iter(self.calibration.apply(found, crm_probabilities).tolist())
        return [prompt if isinstance(prompt, InputError) else next(probabilities) for prompt in prompts]

    def _prompts(
        self, requests: Sequence[Request]
    ) -> tuple[list[Example | InputError], Collator, np.ndarray | None]:
        """The prompt of each request, or why it has none, what makes batches of them, and what the CRM says.

        That is (n,) probabilities, of the model that the run is stacked on; None where there is none.
        """
        data = self._requests.dataset(requests)
        said = {crm: crm.predict(data) for crm in {self._crm, self._beside} if crm is not None}
        retrieved, collator = None, self._task.collator
        if self._embeddings is not None:
            retrieved = find_positions(self._embeddings, data, self._task.config.k)
        if self._crm is not None:
            collator = self._task.collator_of(*said[self._crm])
        beside = None if self._beside is None else said[self._beside][1].numpy()
        examples = Examples(
            self._task.prompts.of(data),
            Inputs(data, retrieved),
            np.arange(len(requests)),
            np.full(len(requests), retrieved is not None),
            self._task.config.recent_behaviours,
        )
        prompts = [_or_error(examples.__getitem__, row) for row in range(len(requests))]
        return prompts, collator, beside


class _Job:
    """Requests of one call, and what becomes of them."""

    def __init__(self, requests: Sequence[Request], done: Callable[[int], object] | None) -> None:
        self.requests, self.done = requests, done
        self.answers: Future[list[Answer]] = Future()


def _check_items(dataset: Dataset, own: str, inputs: Mapping[str, str]) -> None:
    """Raise an InputError unless the data have the items of the run, whose embeddings go by their rows.

    Args:
        own: folder of the run's data, which may have changed, or be gone.
        inputs: hashes of the files that the run was trained with.
    """
    recorded = inputs.get(_ITEMS)
    if recorded == sha256_file(dataset.folder / _ITEMS):
        return
    path = Path(own) / _ITEMS
    if path.is_file() and recorded in (None, sha256_file(path)):
        ids = Table(own, "items", ["item_id"]).read()["item_id"]
        same = ids.to_pylist() == dataset.items["item_id"].to_pylist()
    else:
        same = recorded is None
    if not same:
        raise InputError(
            f"{dataset.folder}: expected the items that the run was trained with, found others; "
            "new ones need embeddings and a run of their own"
        )


def _check_wording(dataset: Dataset, path: Path) -> None:
    """Raise an InputError unless the data put prompts as they did at training; earlier runs do not know."""
    known = read_json(path) if path.is_file() else {}
    changed = [
        f"{name} {shown(dataset.meta.get(name))} in the place of {shown(value)}"
        for name, value in known.items()
        if dataset.meta.get(name) != value
    ]
    if changed:
        raise InputError(
            f"{dataset.folder}: expected the wording that the run was trained with, "
            f"found {', '.join(changed)}"
        )


def _any_request(dataset: Dataset) -> Request:
    """One that can be answered: the data's first sample."""
    samples = dataset.samples
    return Request(int(samples.user[0]), int(samples.item[0]), int(samples.position[0]))


def _said(rows: object) -> str:
    """A data frame's own words are a table of many lines."""
    return f"a {type(rows).__name__}" if hasattr(rows, "columns") else shown(rows)


def _or_error(function: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return function(argument)
    except InputError as error:
        return error


def _raise_first(found: Sequence[object], place: Callable[[int], str]) -> None:
    for number, value in enumerate(found):
        if isinstance(value, InputError):
            raise InputError(f"{place(number)}: {value}")
