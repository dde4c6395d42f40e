"""Files that are either whole or absent: write under a temporary name, then rename."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from rellax.errors import InputError, one_line

_SCRATCH = 1 << 28  # bytes from which on an array is large


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`: on success it takes `path`'s place, on an error it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path, path.suffix)
    part.touch(exist_ok=False)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, own: Collection[str] | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes `path`'s place, on any error it is removed.

    A folder that stood at `path` before is kept until the new one is complete, and comes back on an error.

    Args:
        path: a new folder, or one to replace.
        own: the only files that a folder to replace may hold, which is not the current one then; None: any.

    Raises:
        InputError: something else stands at `path`; nothing is touched.
    """
    path = Path(path).resolve()
    _check_replaceable(path, own)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path)
    part.mkdir()
    old = part.with_name(f"{part.name}.old")
    try:
        yield part
        if path.exists() and _exchange(part, path):
            return
        try:
            if path.exists():
                path.replace(old)
            part.replace(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.replace(path)
            raise
        if old.exists():
            shutil.rmtree(old)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_replaceable(path: Path, own: Collection[str] | None) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"{path}: expected a new folder, found a file")
    if own is None:
        return
    if path.samefile("."):
        raise InputError(f"{path}: expected another folder than the current one, which would be replaced")
    if others := sorted(file.name for file in path.iterdir() if file.name not in own or file.is_dir()):
        raise InputError(
            f"{path}: expected a new folder, or one of {' and '.join(own)} alone, found {others[0]} in it"
        )


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path, *, maker: str | None = None) -> Any:
    """Read a JSON file, which the command `maker` writes; `InputError` where it is missing or damaged."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # an editor on Windows begins with a mark
    except FileNotFoundError:
        hint = f"; `{maker}` makes it" if maker else ""
        raise InputError(f"{path}: expected a JSON file, found none{hint}") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad JSON or UTF-8, an endless number
        raise InputError(f"{path}: expected JSON, but it is damaged ({one_line(error)})") from None


def scratch_array(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array for values to come. A large one is mapped from a temporary file, if there is room for that.

    The file has no name, and goes when the array does.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size >= _SCRATCH:
        with contextlib.suppress(OSError), tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, size)  # without room a mapped page would end the process
            return np.memmap(file, dtype, mode="r+", shape=shape)
    return np.empty(shape, dtype)


def cache_folder() -> Path:
    """The folder of what is fetched or found once for all runs: `$RELLAX_CACHE`, or `~/.cache/rellax`."""
    return Path(os.environ.get("RELLAX_CACHE") or Path.home() / ".cache" / "rellax")


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


_PLACE = "place.json"


def write_place(folder: str | Path) -> None:
    """Note where a folder is made, and from where the paths in its configuration are seen."""
    write_json(Path(folder) / _PLACE, {"folder": str(Path(folder).resolve()), "cwd": str(Path.cwd())})


def located(folder: str | Path, path: str) -> str:
    """Where that is now what the configuration in `folder` calls `path`.

    That is beside `folder` as it was when that was made, where both have been moved or copied together; or
    where it was, whichever folder is the current one. What is found at neither place stays as it is called.
    """
    place = Path(folder) / _PLACE
    if not place.exists():
        return path
    made = read_json(place)
    then = Path(made["cwd"], path)
    beside = Path(os.path.normpath(Path(folder).resolve() / os.path.relpath(then, made["folder"])))
    for found in (beside, then):
        if found.exists():
            return path if found == Path(path).resolve() else str(found)
    return path


def remove_leftovers(folder: str | Path) -> None:
    """Remove what `atomic_folder` had begun for a folder where its process was killed.

    Only while no other process makes that folder. One that was put aside, and may be the only one, stays.
    """
    folder = Path(folder).resolve()
    found = [path for path in folder.parent.glob(f".{glob.escape(folder.name)}.????????*") if path.is_dir()]
    if not any(path.suffix == ".old" for path in found):
        for path in found:
            if re.fullmatch("[0-9a-f]{8}", path.name.rpartition(".")[2]):
                shutil.rmtree(path, ignore_errors=True)


def _beside(path: Path, suffix: str = "") -> Path:
    """A hidden name beside `path` that nothing has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{suffix}")


def _exchange(a: Path, b: Path) -> bool:
    """Let two folders take each other's name at once; False, and nothing done, where the system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)
