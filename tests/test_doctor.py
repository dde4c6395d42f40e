"""`rellax doctor`: what it says of this machine, and of machines that are broken in one way or another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from rellax.ctr import cli, doctor, runs, selftest
from rellax.ops import _register

OPERATORS = ("cflora_linear", "gate_bank", "soft_prompt", "answer_loss", "history_topk", "item_topk")


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the self-test, which takes seconds."""
    monkeypatch.setattr(doctor, "_tested", lambda *_: iter(()))


def command(**environment: str) -> subprocess.CompletedProcess[str]:
    """`rellax doctor --json` in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RELLAX_BACKEND", "RELLAX_ISA")}
    return subprocess.run(
        [sys.executable, "-m", "rellax.ctr.cli", "doctor", "--json"],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_this_machine() -> None:
    done = command()
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["ok"] is True
    assert found["failed"] == {}
    tested = [(one["operator"], one["dtype"]) for one in found["self-test"] if one["device"] == "cpu"]
    assert tested == [(name, dtype) for name in OPERATORS for dtype in ("float32", "bfloat16")]
    assert {one["backend"] for one in found["self-test"] if one["device"] == "cpu"} == {"cpp"}
    assert all(one["milliseconds"] > 0 and one["error"] <= 1 for one in found["self-test"])
    assert list(found["backends"]) == list(OPERATORS)
    assert found["extension"]["isa"] == found["extension"]["isas"][-1]
    assert found["packages"]["torch"] == metadata.version("torch")


def test_a_backend_that_cannot_run() -> None:
    done = command(RELLAX_BACKEND="triton", TRITON_INTERPRET="0")
    found = json.loads(done.stdout)
    if found["gpus"]["usable"]:
        pytest.skip("Triton runs on this machine")
    assert done.returncode == 1
    assert found["ok"] is False
    assert all("RELLAX_BACKEND=triton" in one["failure"] for one in found["self-test"])
    assert found["backends"]["gate_bank"]["cpu float32"].startswith("none: RELLAX_BACKEND=triton")
    assert any(line.startswith("RELLAX_BACKEND=triton decides") for line in found["advice"])
    assert any(line.startswith("the self-test failed for cflora_linear on cpu") for line in found["advice"])


def test_output_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    results = [
        selftest.Result("gate_bank", "cpu", "float32", "cpp", 1.5, 0.1),
        selftest.Result("item_topk", "cpu", "float32", "cpp", failure="its process ended with signal 11"),
    ]
    monkeypatch.setattr(doctor, "_tested", lambda *_: iter(results))
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "gate_bank      cpu   float32   cpp        ok     1.50 ms" in text
    assert "item_topk      cpu   float32   cpp        FAILED: its process ended with signal 11" in text
    assert "- the self-test failed for item_topk on cpu: RELLAX_BACKEND=reference" in text
    assert text.endswith("Something is wrong.\n")
    assert "C++ kernels: " in text
    assert "tensorboard" in text


@pytest.mark.usefixtures("untested")
def test_every_probe_may_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OSError("no such device\nand more")

    monkeypatch.setattr(doctor, "_PROBES", dict.fromkeys(doctor._PROBES, fail))
    assert doctor.doctor(progress=False) == 1
    text = capsys.readouterr().out
    for name in doctor._PROBES:
        assert f"- {name} could not be examined (OSError: no such device)" in text


def found(**changes: Any) -> dict[str, Any]:
    """What a machine without fault would show, but for `changes`."""
    whole: dict[str, Any] = {
        "machine": {"cores": 8, "threads": 8, "bfloat16": True},
        "gpus": {"usable": False, "torch_cuda": None, "devices": [], "driver": []},
        "extension": {"built": True, "isa": "avx2", "isas": ["baseline", "avx2"]},
        "packages": dict.fromkeys((*doctor._CORE, *doctor.GIVES), "1.0"),
        "outdated": [],
        "variables": {},
        "backends": {},
        "self-test": [],
        "failed": {},
    }
    return whole | changes


def gpu(**changes: Any) -> dict[str, Any]:
    one = {"name": "H100", "memory_gib": 80.0, "capability": "9.0"}
    return {"usable": True, "torch_cuda": "13.0", "devices": [one], "driver": ["H100, 580.1"]} | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"extension": {"built": False}}, "`pip install -e .` in the checkout builds it"),
        (
            {"extension": {"built": True, "isa": "baseline", "isas": ["baseline", "avx2"]}},
            "unset it for avx2",
        ),
        ({"machine": {"cores": 8, "threads": 1, "bfloat16": True}}, "1 of 8 cores: unset OMP_NUM_THREADS"),
        ({"machine": {"cores": 8, "threads": 8, "bfloat16": False}}, "no bfloat16 in hardware"),
        (
            {"machine": {"cores": 8, "threads": 8, "bfloat16": True, "allocator": "glibc"}},
            "`LD_PRELOAD=libtcmalloc_minimal.so.4",
        ),
        ({"variables": {"RELLAX_BACKEND": "reference"}}, "RELLAX_BACKEND=reference decides"),
        ({"gpus": gpu(), "packages": {"triton": None}}, "`pip install triton`"),
        (
            {"gpus": gpu(devices=[{"name": "T4", "capability": "7.5"}])},
            "T4, of capability 7.5, has no bfloat16",
        ),
        ({"gpus": gpu(usable=False, torch_cuda=None)}, "this torch was built without CUDA"),
        ({"gpus": gpu(usable=False)}, "the driver is older than torch's CUDA 13.0"),
        (
            {"packages": {"pyarrow": None}},
            "pyarrow missing for the pipeline's commands: `pip install 'rellax[ctr]'`",
        ),
        ({"packages": {"safetensors": None}}, "safetensors is not installed"),
        ({"outdated": ["peft 0.1 is installed, rellax asks for >=0.18"]}, "`pip install --upgrade peft`"),
    ],
)
def test_advice(changes: dict[str, Any], words: str) -> None:
    (line,) = doctor._advice(found(**changes))
    assert words in line


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what Linux says of a process")
def test_the_allocator_that_was_loaded_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs.allocator() in ("glibc", "tcmalloc", "jemalloc", "mimalloc", None)
    monkeypatch.setattr(Path, "read_text", lambda _: "7f00-7f01 r-xp 0 0 /usr/lib/libtcmalloc_minimal.so.4")
    assert runs.allocator() == "tcmalloc"


def test_no_advice_where_nothing_is_off() -> None:
    assert list(doctor._advice(found())) == []
    assert list(doctor._advice(found(gpus=gpu()))) == []
    assert list(doctor._advice(found(gpus=gpu(), machine={"allocator": "glibc"}))) == []
    assert list(doctor._advice(found(**dict.fromkeys(doctor._PROBES)))) == []


def test_outdated_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of extras that developers alone install, torch's own Triton among them, are left as they are."""
    asked = ["torch>=99", "numpy>=1", "no-such-package>=3"]
    asked += ["numpy>=99; extra == 'dev'", "numpy>=98; extra == 'ctr'"]
    monkeypatch.setattr(doctor, "_requirements", lambda: asked)
    assert doctor._outdated() == [
        f"{name} {metadata.version(name)} is installed, rellax asks for {wanted}"
        for name, wanted in (("torch", ">=99"), ("numpy", ">=98"))
    ]


def test_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._driver() == []
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 'H100, 580.1'\n")
    script.chmod(0o755)
    assert doctor._driver() == ["H100, 580.1"]
    script.write_text("#!/bin/sh\nexit 9\n")
    assert doctor._driver() == []


@pytest.mark.parametrize("name", OPERATORS)
def test_each_test_notices_a_wrong_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = selftest.Trial(name, "cpu", "float32")
    assert selftest.run_one(trial).failure == ""
    build = selftest.CASES[name]

    def spoilt(*arguments: Any) -> selftest._Case:
        case = build(*arguments)

        def wrong(**inputs: Any) -> Any:
            outputs = case.operator(**inputs)
            *rest, last = outputs if isinstance(outputs, tuple) else (outputs,)
            return (*rest, last * 1.001)

        return selftest._Case(wrong, case.truth, case.inputs)

    monkeypatch.setitem(selftest.CASES, name, spoilt)
    assert "times what is allowed" in selftest.run_one(trial).failure


def test_a_process_that_dies_costs_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import json, os, sys\n"
        "for one in json.loads(sys.argv[1]):\n"
        "    if one['dtype'] == 'die': os.kill(os.getpid(), 11)\n"
        "    if one['dtype'] == 'exit': sys.exit('no such library')\n"
        "    if one['dtype'] == 'hang':\n"
        "        import time; time.sleep(60)\n"
        "    print(json.dumps(one), flush=True)\n"
    )
    real = subprocess.Popen

    def start(arguments: list[str], **options: Any) -> Any:
        assert arguments[1:3] == ["-m", "rellax.ctr.selftest"]
        return real([sys.executable, "-c", script, arguments[3]], **options)

    monkeypatch.setattr(selftest.subprocess, "Popen", start)
    todo = [selftest.Trial("x", "cpu", dtype) for dtype in ("a", "die", "b", "exit", "hang", "c")]
    results = list(selftest.run(todo, limit=2))
    assert [(one.dtype, one.failure) for one in results] == [
        ("a", ""),
        ("die", "its process ended with signal 11"),
        ("b", ""),
        ("exit", "its process ended with exit code 1: no such library"),
        ("hang", "no result within 2 seconds"),
        ("c", ""),
    ]


def test_reference_backend_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in ("cpp", None):
        if before is None:
            monkeypatch.delenv("RELLAX_BACKEND", raising=False)
        else:
            monkeypatch.setenv("RELLAX_BACKEND", before)
        with selftest._reference_backend():
            assert _register.backend_of("gate_bank", torch.device("cpu")) == "reference"
        assert os.environ.get("RELLAX_BACKEND") == before


def test_without_the_ctr_extra() -> None:
    """Its packages are hidden; the doctor runs all the same, and names what is missing."""
    hidden = ("pyarrow", "sklearn", "fuxictr", "matplotlib", "accelerate", "peft", "gguf", "ray", "faiss")
    script = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({hidden}))\n"
        "from rellax.ctr import cli, doctor\n"
        "doctor._tested = lambda *_: iter(())\n"
        "sys.exit(cli.main(['doctor']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("All is well.\n")
