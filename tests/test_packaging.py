"""The sdist and the wheel: built from what they should hold, and run where there is no compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path

import pytest

import rellax

ROOT = Path(__file__).parents[1]
USE = """
import torch, rellax
from rellax import _C
generator = torch.manual_seed(0)
embeddings = torch.randn(50, 16, generator=generator)
items, offsets = torch.randint(50, (40,), generator=generator), torch.tensor([0, 40])
positions, _ = rellax.ops.history_topk(embeddings, items, offsets, 3)
expected = embeddings[items[:39]] @ embeddings[items[39]]
assert expected[positions[39]].tolist() == expected.sort(descending=True).values[:3].tolist()
print(rellax.__file__, _C.__file__)
"""


@dataclass
class Built:
    sdist: Path
    wheel: Path

    def of_sdist(self) -> set[str]:
        with tarfile.open(self.sdist) as archive:
            return {name.partition("/")[2] for name in archive.getnames()}

    def of_wheel(self, part: str) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return {name for name in archive.namelist() if name.startswith(part)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An sdist of the checkout, and a wheel of that sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Built(sdist, wheel)


def package_files() -> set[str]:
    """What is in the package's folder, but for what Python and the build put there."""
    found = (path for path in (ROOT / "rellax").rglob("*") if path.is_file())
    ours = (path for path in found if path.suffix not in (".so", ".pyc"))
    return {path.relative_to(ROOT).as_posix() for path in ours}


def test_what_the_wheel_holds(built: Built) -> None:
    (extension,) = built.of_wheel("rellax/_C")
    assert built.of_wheel("rellax/") == package_files() | {extension}
    (folder,) = {name.partition("/")[0] for name in built.of_wheel("")} - {"rellax"}
    assert folder == f"rellax-{rellax.__version__}.dist-info"
    files = {"METADATA", "WHEEL", "RECORD", "entry_points.txt"} | {
        "licenses/LICENSE",
        "licenses/csrc/LICENSE.nanobind",
    }
    assert built.of_wheel(folder) == {f"{folder}/{name}" for name in files}


def test_the_wheel_is_for_the_right_pythons(built: Built) -> None:
    version = f"cp3{sys.version_info.minor}"
    tag = "cp312-abi3" if sys.version_info >= (3, 12) else f"{version}-{version}"
    assert built.wheel.name.startswith(f"rellax-{rellax.__version__}-{tag}-")


def test_what_the_sdist_holds(built: Built) -> None:
    held = built.of_sdist()
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")}
    assert {"pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"} | sources | package_files() <= held
    stray = re.compile(r"(^|/)(build|dist|runs|\.git|\.venv|__pycache__)/|\.(o|a|so|pyc|whl)$")
    assert not [name for name in held if stray.search(name)]


def test_metadata(built: Built) -> None:
    (name,) = (name for name in built.of_wheel("rellax-") if name.endswith("/METADATA"))
    with zipfile.ZipFile(built.wheel) as archive:
        metadata = message_from_bytes(archive.read(name))
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    extras = {"bench", "ctr", "dev", "docs", "faiss", "quant", "ray"}
    assert extras <= set(metadata.get_all("Provides-Extra"))


def test_the_build_needs_no_pytorch() -> None:
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert {re.split(r"\W", entry)[0] for entry in requires} == {"scikit", "nanobind"}


def test_the_wheel_runs_without_a_compiler(built: Built, tmp_path: Path) -> None:
    """In a new environment of its own, with the packages that rellax needs, and an empty PATH."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", str(built.wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(others))  # after the wheel; their own .pth are not read

    def run(*command: str) -> str:
        environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "RELLAX_BACKEND": "cpp"}
        environment |= {name: value for name, value in os.environ.items() if name.startswith("OMP_")}
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    package = packages / "rellax"
    (extension,) = package.glob("_C*.so")
    assert run(str(python), "-W", "error::UserWarning", "-c", USE).split() == [
        str(package / "__init__.py"),
        str(extension),
    ]
    command = str(python.with_name("rellax"))
    assert run(command, "--version") == f"rellax {rellax.__version__}\n"
    assert "rellax prepare" in run(command, "prepare", "--help")


def test_the_extension_runs_without_pytorch() -> None:
    """What cibuildwheel does with each wheel."""
    script = ROOT / "tests" / "extension_alone.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert "_C" in done.stdout
