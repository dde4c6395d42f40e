"""predictions.parquet: what a model said of samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rellax._files import atomic_file
from rellax.errors import InputError, one_line

FILE = "predictions.parquet"


@dataclass(frozen=True)
class Predictions:
    """Samples, their labels, and the probability of label 1, each (n,).

    Attributes:
        path: where they were read.
    """

    samples: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    path: Path | None = field(default=None, compare=False)

    @classmethod
    def read(cls, folder: str | Path) -> Predictions:
        """Those of a folder.

        Raises:
            InputError: it has none, or they are damaged.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise InputError(f"{path}: expected predictions, found none")
        try:
            table = pq.read_table(path, columns=["sample", "label", "probability"])
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: expected predictions, but it is damaged ({one_line(error)})") from None
        samples, labels, probabilities = (column.to_numpy() for column in table.columns)
        return cls(samples, labels, probabilities, path)

    def write(self, folder: str | Path) -> None:
        """Write them to a folder: sample int32, label int8, probability float64."""
        columns = {
            "sample": self.samples.astype(np.int32),
            "label": self.labels.astype(np.int8),
            "probability": self.probabilities.astype(np.float64),
        }
        with atomic_file(Path(folder) / FILE) as part:
            pq.write_table(pa.table(columns), part)

    def at(self, samples: np.ndarray) -> Predictions:
        """Those of some of the samples, in their order.

        Raises:
            InputError: one of them has none.
        """
        known = np.isin(samples, self.samples)
        if not known.all():
            raise InputError(
                f"{self.path or FILE}: expected predictions of {len(samples):,} samples, found none of "
                f"{(~known).sum():,} of them"
            )
        order = np.argsort(self.samples, kind="stable")
        rows = order[np.searchsorted(self.samples, samples, sorter=order)]
        return Predictions(self.samples[rows], self.labels[rows], self.probabilities[rows], self.path)
