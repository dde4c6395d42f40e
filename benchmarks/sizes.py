"""Small sizes for a dry run: the only place where RELLAX_DRY is read."""

from __future__ import annotations

import os
from typing import Any

DRY = os.environ.get("RELLAX_DRY") == "1"


def dry(module: dict[str, Any], **small: Any) -> None:
    """In a dry run, give the constants of a benchmark's module these values instead of its own.

    Call it right after the constants: what is derived from them, in this process or in one that imports the
    module anew, is small too. A benchmark without such a call takes no part in a dry run.
    """
    if unknown := small.keys() - module.keys():
        raise NameError(f"no constant of this module: {', '.join(sorted(unknown))}")
    if DRY:
        module.update(small)
