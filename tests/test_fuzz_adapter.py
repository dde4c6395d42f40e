"""Hostile adapters: one sentence, the model unchanged, and no memory for what a file only claims."""

from __future__ import annotations

import contextlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from fuzzing import at_most_one_sentence, examples, one_sentence
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_patch import snapshot

from rellax._files import read_json, sha256_file
from rellax.patch import export_peft, load_adapter, peft_files, save_adapter
from rellax.patch.config import CFLoRAConfig
from rellax.subr import load_embeddings

HUGE = 10**9


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter; not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(tiny.patched(tiny.base_model(), loss="vocab", interaction="diagonal"), folder)
    return folder


@pytest.fixture(scope="module")
def models() -> list[Any]:
    """An unpatched and a patched model, and what loading must not change."""
    return [tiny.base_model(), tiny.patched(tiny.base_model(), interaction="diagonal")]


def write(folder: Path, description: Any, tensors: bytes, *, sealed: bool = True) -> Path:
    """An adapter's two files; `sealed`: with the hash that makes the loader read on."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter.safetensors").write_bytes(tensors)
    if sealed and isinstance(description, dict):
        description = description | {"sha256": sha256_file(folder / "adapter.safetensors")}
    text = description if isinstance(description, str) else json.dumps(description)
    (folder / "adapter.json").write_text(text)
    return folder


def refused(models: list[Any], folder: Path) -> None:
    for model in models:
        before, values = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
        with one_sentence():
            load_adapter(model, folder)
        assert snapshot(model) == before
        assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())


def with_header(content: bytes, change: Any) -> bytes:
    """A safetensors file whose header `change` made another."""
    (size,) = struct.unpack("<Q", content[:8])
    text = json.dumps(change(json.loads(content[8 : 8 + size]))).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def first(field: str, value: Any) -> Any:
    """Change a field of the first tensor in a header."""

    def change(header: dict[str, Any]) -> dict[str, Any]:
        name = next(name for name in header if name != "__metadata__")
        return header | {name: header[name] | {field: value}}

    return change


def test_bytes_that_changed_in_the_tensors(saved: Path, models: list[Any], tmp_path: Path) -> None:
    content = (saved / "adapter.safetensors").read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    description = read_json(saved / "adapter.json")

    @examples(40)
    @given(st.integers(0, header + 7), st.integers(1, 255), st.booleans(), st.integers(0, len(content) - 1))
    def check(at: int, flip: int, cut: bool, end: int) -> None:
        damaged = bytearray(content)
        damaged[at] ^= flip
        folder = write(tmp_path / "a", description, bytes(damaged[:end] if cut else damaged))
        expected = None
        with contextlib.suppress(Exception):
            expected = load_file(folder / "adapter.safetensors")
        good = load_file(saved / "adapter.safetensors")
        shapes = {name: tensor.shape for name, tensor in (expected or {}).items()}
        if shapes == {name: tensor.shape for name, tensor in good.items()}:
            return  # white space, another dtype of that width: not to be told from a good one
        refused(models, folder)
        refused(models, write(tmp_path / "b", description, bytes(damaged), sealed=False))

    check()


@pytest.mark.parametrize(
    "change",
    [
        lambda content: struct.pack("<Q", 2**63) + content[8:],
        lambda content: struct.pack("<Q", 2**40) + content[8:],
        lambda content: struct.pack("<Q", 0) + content[8:],
        lambda content: b"",
        lambda content: content[:8],
        lambda content: with_header(content, first("shape", [-1, 4])),
        lambda content: with_header(content, first("shape", [2**62, 2**62])),
        lambda content: with_header(content, first("shape", [])),
        lambda content: with_header(content, first("data_offsets", [0, 2**60])),
        lambda content: with_header(content, first("data_offsets", [8, 0])),
        lambda content: with_header(content, first("data_offsets", [-8, 8])),
        lambda content: with_header(content, first("dtype", "I32")),
        lambda content: with_header(content, first("dtype", "OBJECT")),
        lambda content: with_header(content, lambda header: []),
        lambda content: with_header(content, lambda header: {}),
        lambda content: content.replace(b"lora_b", b"lora_a"),
        lambda content: b"\x80\x04." + content,
    ],
)
def test_hostile_headers(saved: Path, models: list[Any], tmp_path: Path, change: Any) -> None:
    content = change((saved / "adapter.safetensors").read_bytes())
    refused(models, write(tmp_path / "adapter", read_json(saved / "adapter.json"), content))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers(saved: Path, models: list[Any], tmp_path: Path, value: float) -> None:
    tensors = load_file(saved / "adapter.safetensors")
    next(iter(tensors.values())).flatten()[0] = value
    save_file(tensors, tmp_path / "t")
    description = read_json(saved / "adapter.json")
    refused(models, write(tmp_path / "adapter", description, (tmp_path / "t").read_bytes()))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def test_descriptions_of_anything(saved: Path, models: list[Any], tmp_path: Path) -> None:
    description, content = read_json(saved / "adapter.json"), (saved / "adapter.safetensors").read_bytes()
    fields = ["format", "base_model", "base_weights", "config", "placeholder_ids"]

    @examples(40)
    @given(st.sampled_from(fields), JUNK)
    def check(field: str, junk: Any) -> None:
        # An unpatched model takes any token for the placeholder.
        is_token = field == "placeholder_ids" and isinstance(junk, list) and all(type(i) is int for i in junk)
        at_fault = models[1:] if is_token else models
        if field == "base_weights" and junk == {}:
            return  # as if nothing had been noted
        refused(at_fault, write(tmp_path / "adapter", description | {field: junk}, content))

    check()


def test_configurations_of_anything(saved: Path, models: list[Any], tmp_path: Path) -> None:
    description, content = read_json(saved / "adapter.json"), (saved / "adapter.safetensors").read_bytes()
    harmless = (
        "dropout",
        "answer_ids",
        "gate_init",
        "loss",
    )  # nothing in the tensors says that they are wrong

    @examples(60)
    @given(st.sampled_from(sorted(description["config"])), JUNK | st.just(HUGE))
    def check(field: str, junk: Any) -> None:
        config = description["config"] | {field: junk}
        with contextlib.suppress(ValueError):
            CFLoRAConfig.from_dict(config)
            if field in harmless or junk == description["config"][field]:
                return
        at_fault = models[1:] if field == "alpha" else models  # an unpatched model takes any
        refused(at_fault, write(tmp_path / "adapter", description | {"config": config}, content))

    check()


def test_configurations_of_peft_of_anything(saved: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="dropped"):
        export_peft(saved, tmp_path / "peft")
    config = read_json(tmp_path / "peft" / "adapter_config.json")
    more = ["alpha_pattern", "init_lora_weights", "layers_to_transform", "use_rslora", "use_dora"]

    @examples(60)
    @given(st.sampled_from([*sorted(config), *more]), JUNK)
    def check(field: str, junk: Any) -> None:
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config | {field: junk}))
        with at_most_one_sentence():
            CFLoRAConfig(**peft_files.read(tmp_path / "peft")[0])

    check()


@pytest.mark.parametrize("field", ["r", "cond_dim"])
def test_no_memory_for_sizes_that_are_only_claimed(
    saved: Path, models: list[Any], tmp_path: Path, field: str
) -> None:
    description, content = read_json(saved / "adapter.json"), (saved / "adapter.safetensors").read_bytes()
    description["config"][field] = HUGE
    refused(models, write(tmp_path / "adapter", description, content))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 10_000,
        "NaN",
        "",
        "\x00",
        '{"format": 1, "format": 1}',
        "\ud800".encode("utf-8", "surrogatepass"),
    ],
    ids=range(8),
)
def test_json_that_is_none(saved: Path, models: list[Any], tmp_path: Path, text: str | bytes) -> None:
    folder = write(tmp_path / "adapter", "", (saved / "adapter.safetensors").read_bytes())
    (folder / "adapter.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(models, folder)


def test_a_folder_in_place_of_a_file(saved: Path, models: list[Any], tmp_path: Path) -> None:
    (tmp_path / "adapter" / "adapter.json").mkdir(parents=True)
    refused(models, tmp_path / "adapter")


def test_links_are_followed_as_hubs_make_them(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    for file in saved.iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    assert load_adapter(tiny.base_model(), tmp_path / "linked").rellax.report.patched


def test_embeddings_of_random_bytes(tmp_path: Path) -> None:
    @examples(40)
    @given(st.binary(max_size=64), st.booleans())
    def check(content: bytes, measured: bool) -> None:
        content = struct.pack("<Q", len(content)) + content if measured else content
        (tmp_path / "embeddings.safetensors").write_bytes(content)
        with one_sentence():
            load_embeddings(tmp_path)

    check()
