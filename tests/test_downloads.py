"""Published archives: whole and checked, or one sentence and nothing left; nothing lands elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
import stat
import zipfile
from pathlib import Path

import pytest
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st

from rellax._files import sha256_file
from rellax.ctr import downloads
from rellax.ctr.downloads import ARCHIVES, Archive, published
from rellax.errors import InputError

MEMBERS = ("ml/ratings.dat", "ml/movies.dat")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RELLAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def zipped(tmp_path: Path) -> Path:
    """An archive that also holds members which would land elsewhere."""
    path = tmp_path / "ml.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in (*MEMBERS, "../evil.dat", "/tmp/evil.dat", "ml/../../evil.dat"):
            archive.writestr(name, f"the contents of {name}")
    return path


def serve(monkeypatch: pytest.MonkeyPatch, zipped: Path, **changes: object) -> None:
    """Make `zipped` the archive of ml-1m, at a URL of its own."""
    archive = Archive(
        url=zipped.as_uri(),
        size=zipped.stat().st_size,
        sha256=sha256_file(zipped),
        md5=hashlib.md5(zipped.read_bytes()).hexdigest(),
        members=MEMBERS,
    )
    monkeypatch.setitem(ARCHIVES, "ml-1m", dataclasses.replace(archive, **changes))


def left(cache: Path) -> set[str]:
    return {path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_fetched_once(cache: Path, zipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, zipped)
    folder = published("ml-1m")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "ratings.dat": "the contents of ml/ratings.dat",
        "movies.dat": "the contents of ml/movies.dat",
    }
    zipped.unlink()
    assert published("ml-1m") == folder
    assert not list(cache.parent.rglob("evil*"))


def test_a_half_download_is_not_taken_for_whole(
    cache: Path, zipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, zipped)
    whole = zipped.read_bytes()
    zipped.write_bytes(whole[:100])
    with pytest.raises(
        InputError, match=rf"expected {len(whole)} bytes, found 100; place the file at {cache}"
    ):
        published("ml-1m")
    assert left(cache) == set()
    zipped.write_bytes(whole)
    assert published("ml-1m").is_dir()


@pytest.mark.parametrize(("field", "name"), [("sha256", "SHA-256"), ("md5", "MD5")])
def test_other_contents_are_refused(
    cache: Path, zipped: Path, monkeypatch: pytest.MonkeyPatch, field: str, name: str
) -> None:
    serve(monkeypatch, zipped, **{field: "0" * 32})
    with pytest.raises(InputError, match=rf"ml.zip: expected {name} 0+, found [0-9a-f]+; place the file at"):
        published("ml-1m")
    assert left(cache) == set()


def test_without_a_known_hash_the_first_one_counts(
    cache: Path, zipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, zipped, sha256=None, md5=None)
    folder = published("ml-1m")
    kept = cache / "archives" / "ml.zip"
    assert (cache / "archives" / "ml.zip.sha256").read_text() == f"{sha256_file(zipped)}  ml.zip\n"
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    changed = bytearray(kept.read_bytes())
    changed[40] ^= 1
    kept.write_bytes(changed)
    with pytest.raises(InputError, match=r"ml.zip: expected SHA-256 .*; delete the file and try again"):
        published("ml-1m")
    kept.unlink()  # and what is fetched anew must be the same as the first time
    zipped.write_bytes(changed)
    with pytest.raises(InputError, match=r"ml.zip: expected SHA-256 .*; place the file at"):
        published("ml-1m")


def test_a_file_placed_by_hand_is_checked_and_used(
    cache: Path, zipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, zipped, url="http://localhost:1/ml.zip")
    with pytest.raises(InputError, match=r"http://localhost:1/ml.zip: could not be downloaded .* with --raw"):
        published("ml-1m")
    assert left(cache) == set()
    (cache / "archives").mkdir(exist_ok=True)
    zipped.rename(cache / "archives" / "ml.zip")
    assert published("ml-1m").is_dir()


def test_an_archive_without_a_member(cache: Path, zipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, zipped, members=("ml/users.dat",))
    with pytest.raises(InputError, match=r"ml.zip: expected ml/users.dat in it"):
        published("ml-1m")
    assert not (cache / "ml-1m").exists()


def test_what_is_known_of_the_archives_is_well_formed() -> None:
    for archive in ARCHIVES.values():
        assert archive.sha256 is None or len(bytes.fromhex(archive.sha256)) == 32
        assert archive.md5 is None or len(bytes.fromhex(archive.md5)) == 16
        assert archive.filename.endswith(".zip")
    assert downloads.cache_folder().is_absolute()


@pytest.mark.parametrize(
    "name",
    ["../evil.dat", "/tmp/evil.dat", "ml/../../evil.dat", "C:\\evil.dat", "ml\\..\\..\\evil.dat", "ml/.."],
)
def test_no_member_leaves_its_folder(tmp_path: Path, name: str) -> None:
    path, folder = tmp_path / "a.zip", tmp_path / "in" / "out"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "x")
    before = {*tmp_path.rglob("*")}
    with contextlib.suppress(InputError):
        downloads.extract(path, (name,), folder)
    assert all(file.parent == folder for file in {*tmp_path.rglob("*")} - before)
    assert not Path("/tmp/evil.dat").exists()


def test_a_link_in_an_archive_is_no_link(tmp_path: Path) -> None:
    path, secret = tmp_path / "a.zip", tmp_path / "secret"
    secret.write_text("secret")
    with zipfile.ZipFile(path, "w") as archive:
        entry = zipfile.ZipInfo("ml/ratings.dat")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, str(secret))
    downloads.extract(path, ("ml/ratings.dat",), tmp_path)
    assert not (tmp_path / "ratings.dat").is_symlink()
    assert (tmp_path / "ratings.dat").read_text() == str(secret)


def test_what_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(1 << 20))
    monkeypatch.setattr(downloads, "_LARGEST", 1 << 19)
    with pytest.raises(InputError, match=r"a.zip: expected bomb of at most 524,288 bytes, found more"):
        downloads.extract(path, ("bomb",), tmp_path)
    assert not (tmp_path / "bomb").exists()


def test_a_size_that_lies_unpacks_to_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(1 << 20))
    content = path.read_bytes()
    path.write_bytes(content.replace((1 << 20).to_bytes(4, "little"), (1 << 10).to_bytes(4, "little")))
    with pytest.raises((InputError, zipfile.BadZipFile)):
        downloads.extract(path, ("bomb",), tmp_path)
    assert not (tmp_path / "bomb").exists() or (tmp_path / "bomb").stat().st_size <= 1 << 10


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_two_members_of_a_name_one_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ml/ratings.dat", "first")
        archive.writestr("ml/ratings.dat", "second")
    downloads.extract(path, ("ml/ratings.dat",), tmp_path)
    assert (tmp_path / "ratings.dat").read_text() == "second"


def test_damaged_archives_are_a_sentence(cache: Path, zipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(zipped.read_bytes())

    @examples(40)
    @given(st.integers(0, len(content) - 1), st.integers(1, 255))
    def check(at: int, flip: int) -> None:
        damaged = bytearray(content)
        damaged[at] ^= flip
        zipped.write_bytes(damaged)
        serve(monkeypatch, zipped)
        shutil.rmtree(cache, ignore_errors=True)
        try:
            published("ml-1m")
        except InputError:
            assert not (cache / "ml-1m").exists()

    check()
