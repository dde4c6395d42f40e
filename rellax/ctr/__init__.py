"""The pipeline, from raw files to a service: `rellax.ctr.Predictor` answers requests with a finished run.

It is imported when it is first asked for, as it brings all that the extra `ctr` installs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rellax.ctr.predictor import Predictor

__all__ = ["Predictor"]


def __getattr__(name: str) -> Any:
    if name != "Predictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rellax.ctr.predictor import Predictor

    return Predictor
