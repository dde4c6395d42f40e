"""What is fetched is fetched once, checked, and kept under `$RELLAX_CACHE`, or `~/.cache/rellax`.

Here: the cache, and the data sets that their publishers hand out as archives. An archive is compared with its
size and hash before it gets its name, so a broken download is never taken for whole; only the members that
are needed leave it, under their last names, so none can land anywhere else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import http.client
import logging
import lzma
import shutil
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from rellax._files import atomic_file, atomic_folder, cache_folder, sha256_file
from rellax.errors import InputError

logger = logging.getLogger(__name__)

_BLOCK = 1 << 20
_LARGEST = 4 << 30  # bytes of an unpacked member: six times the largest that is known
_BROKEN = (KeyError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
_TIMEOUT = 60  # seconds without a byte


@dataclass(frozen=True)
class Archive:
    """A publisher's archive of a data set.

    Attributes:
        url: where the publisher has it.
        size: in bytes.
        sha256: where it is known; where it is not, that of the first download is kept and compared with.
        md5: where it is known.
        members: the files that are needed.
    """

    url: str
    size: int
    sha256: str | None
    md5: str | None
    members: tuple[str, ...]

    @property
    def filename(self) -> str:
        return self.url.rsplit("/", 1)[1]


# Where these hashes come from, and who says so: docs/own-data.md, "Published data sets".
ARCHIVES = {
    "ml-1m": Archive(
        url="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        size=5_917_549,
        sha256="a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
        md5="c4d9eecfca2ab87c1945afe126590906",
        members=("ml-1m/ratings.dat", "ml-1m/movies.dat", "ml-1m/users.dat"),
    ),
    "ml-25m": Archive(
        url="https://files.grouplens.org/datasets/movielens/ml-25m.zip",
        size=261_978_986,
        sha256="8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa",
        md5="6b51fb2759a8657d3bfcbfc42b592ada",
        members=("ml-25m/ratings.csv", "ml-25m/movies.csv"),
    ),
    "bookcrossing": Archive(
        url="http://www2.informatik.uni-freiburg.de/~cziegler/BX/BX-CSV-Dump.zip",
        size=26_085_508,
        sha256=None,
        md5="37d647ee9e18ba134ea6d78ee4fe5292",
        members=("BX-Book-Ratings.csv", "BX-Books.csv", "BX-Users.csv"),
    ),
}


def published(name: str) -> Path:
    """Folder with the files of the data set `name` as its publisher hands them out; fetched on first use.

    Raises:
        InputError: no network, the publisher no longer has it, or it is not the archive that is known.
    """
    archive, folder = ARCHIVES[name], cache_folder() / name
    with locked(folder):
        if not folder.exists():
            path = _fetch(archive)
            with atomic_folder(folder) as part:
                try:
                    extract(path, archive.members, part)
                except (*_BROKEN, OSError) as error:  # EINVAL: of a place before the file
                    if (
                        isinstance(error, OSError) and error.errno != errno.EINVAL
                    ):  # of a place before the file
                        raise
                    raise InputError(
                        f"{path}: expected {', '.join(archive.members)} in it ({error})"
                    ) from None
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time make `folder`; the others wait and then find it made."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def extract(archive: Path, members: tuple[str, ...], folder: Path) -> None:
    """Copy `members` of an archive into `folder` under their last names; none of its paths is followed."""
    with zipfile.ZipFile(archive) as file:
        for member in members:
            entry, name = file.getinfo(member), Path(member).name
            if name in ("", ".."):
                raise InputError(f"{archive}: expected the name of a file, got {member!r}")
            if entry.file_size > _LARGEST:
                raise InputError(f"{archive}: expected {member} of at most {_LARGEST:,} bytes, found more")
            # No more than the size that the archive gives is ever read, whatever its data unpack to.
            with file.open(entry) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)


def _fetch(archive: Archive) -> Path:
    """Path of the archive in the cache, downloaded where it is not there yet, and checked either way."""
    path = cache_folder() / "archives" / archive.filename
    record = path.with_name(f"{path.name}.sha256")
    if path.exists():
        _check(path, archive, record, name=str(path), hint="delete the file and try again")
    else:
        logger.info("Fetching %s", archive.url)
        hint = f"place the file at {path}, or name the folder of its files with --raw"
        with atomic_file(path) as part:
            with part.open("wb") as file:
                for block in _blocks(archive, hint):
                    file.write(block)
            _check(part, archive, record, name=archive.url, hint=hint)
    return path


def _blocks(archive: Archive, hint: str) -> Iterator[bytes]:
    """The bytes at the archive's URL, with a progress bar."""
    bar = tqdm(total=archive.size, desc=archive.filename, unit="B", unit_scale=True)
    try:
        with bar, urllib.request.urlopen(archive.url, timeout=_TIMEOUT) as response:
            while block := response.read(_BLOCK):
                bar.update(len(block))
                yield block
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"{archive.url}: could not be downloaded ({error}); {hint}") from None


def _check(path: Path, archive: Archive, record: Path, *, name: str, hint: str) -> None:
    """Compare a file with what is known of the archive, and keep its hash where no better one is known."""
    size = path.stat().st_size
    if size != archive.size:
        raise InputError(f"{name}: expected {archive.size:,} bytes, found {size:,}; {hint}")
    if archive.md5 is not None and (md5 := _md5(path)) != archive.md5:
        raise InputError(f"{name}: expected MD5 {archive.md5}, found {md5}; {hint}")
    found = sha256_file(path)
    expected = archive.sha256
    if expected is None and record.exists():
        expected = record.read_text(encoding="utf-8").split()[0]
    if expected is None:
        with atomic_file(record) as part:
            part.write_text(f"{found}  {archive.filename}\n", encoding="utf-8")
    elif found != expected:
        raise InputError(f"{name}: expected SHA-256 {expected}, found {found}; {hint}")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.md5(usedforsecurity=False)
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
