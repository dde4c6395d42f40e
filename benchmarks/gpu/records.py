"""What a section found, as it finds it: lines of JSON in a file that the process which started it reads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Records = dict[str, dict[str, Any]]
"""By name; of records with the same name the last one counts."""

FILE = "RELLAX_RECORDS"
"""The environment variable that names the file."""


def emit(name: str, **values: Any) -> None:
    """Write one record; without a file for them, to the standard output."""
    line = json.dumps({"name": name, **values})
    if path := os.environ.get(FILE):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")
    else:
        print(line)


def read(path: Path) -> Records:
    """All whole lines written so far."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    records: Records = {}
    for line in text[: text.rfind("\n") + 1].splitlines():
        record = json.loads(line)
        records[record.pop("name")] = record
    return records
