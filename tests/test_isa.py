"""Every ISA level of the C++ kernels gives the same bits; RELLAX_ISA chooses one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rellax import _C

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
DIGEST = """
import hashlib, torch
from rellax import _C
from rellax.ops import history_topk, item_topk, soft_prompt
generator = torch.manual_seed(0)
offsets = torch.tensor([0, 0, 1, 50, 300])
items = torch.randint(200, (300,), generator=generator)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for dim in (1, 15, 64, 129):
        embeddings = torch.randn(300, dim, generator=generator).to(dtype)
        for result in history_topk(embeddings, items, offsets, 30):
            digest.update(result.numpy().tobytes())
        for result in (*item_topk(embeddings, 30), *item_topk(embeddings, 7, queries=items[:9])):
            digest.update(result.numpy().tobytes())
ids, index = torch.randint(9, (2, 5, 40), generator=generator)
index, scale = torch.where(index < 5, index, -1), torch.tensor(1.7)
for words in (torch.float32, torch.bfloat16, torch.float16):
    for soft in (torch.float32, torch.bfloat16, torch.float16):
        table = torch.randn(9, 1041, generator=generator).to(words).requires_grad_()
        rows = torch.randn(5, 1041, generator=generator).to(soft).requires_grad_()
        y = soft_prompt(ids, table, rows, index, word_scale=scale)
        for result in (y.detach(), *torch.autograd.grad(y, (table, rows), torch.randn(y.shape).to(words))):
            digest.update(result.view(torch.uint8).numpy().tobytes())
print(_C.isa(), digest.hexdigest())
"""


HALVES = """
import torch
from rellax.ops import soft_prompt
halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).view(-1, 16)
expected = halves.float()
index = torch.arange(len(halves))[None]
for flush in (False, True):
    torch.set_flush_denormal(flush)
    y = soft_prompt(torch.zeros_like(index), torch.zeros(1, 16), halves, index)[0]
    assert torch.equal(y.nan_to_num(), expected.nan_to_num()), flush
    assert torch.equal(y.isnan(), expected.isnan())
"""


def run(code: str, isa: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RELLAX_ISA"}
    environment |= {"RELLAX_BACKEND": "cpp"} | ({} if isa is None else {"RELLAX_ISA": isa})
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_level_gives_the_same_bits_and_the_best_one_is_the_default() -> None:
    levels = _C.supported_isas()
    assert levels[0] == "baseline"
    outputs = {isa: run(DIGEST, isa) for isa in [*levels, None]}
    failed = {isa: output.stderr for isa, output in outputs.items() if output.returncode}
    assert not failed
    used = {isa: output.stdout.split() for isa, output in outputs.items()}
    assert {isa: level for isa, (level, _) in used.items()} == {isa: isa or levels[-1] for isa in outputs}
    assert len({digest for _, digest in used.values()}) == 1


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_fp16_is_read_as_it_is_where_the_processor_flushes_subnormal_numbers(isa: str) -> None:
    output = run(HALVES, isa)
    assert output.returncode == 0, output.stderr


@pytest.mark.parametrize("isa", _C.supported_isas()[:-1])
def test_every_level_passes_the_oracle(isa: str) -> None:
    """The best level runs all tests; the others run those that compare a C++ kernel with fp64."""
    tests = [
        "test_answer.py::test_equals_cross_entropy_of_full_logits",
        "test_cflora.py::test_equals_a_loop_over_instances",
        "test_cflora.py::test_a_set_equals_its_layers",
        "test_cflora.py::test_an_update_is_added_to_what_the_layer_gave",
        "test_cflora.py::test_same_bits_on_any_number_of_threads",
        "test_gate_bank.py::test_equals_separate_perceptrons",
        "test_gate_bank.py::test_gelu_everywhere",
        "test_history_topk.py::test_every_regime_gives_the_bits_of_a_brute_force",
        "test_item_topk.py::test_every_bit_is_that_of_the_brute_force",
        "test_item_topk.py::test_shortlists_that_overflow",
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not reference and not triton",
        *(str(HERE / test) for test in tests),
    ]
    environment = os.environ | {"RELLAX_ISA": isa}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stdout


@pytest.mark.parametrize("isa", ["AVX2", "sse9", "avx512 "])
def test_an_unknown_level_is_an_error_that_names_the_known_ones(isa: str) -> None:
    output = run("from rellax import _C; _C.isa()", isa)
    assert output.returncode == 1
    known = ", ".join(_C.supported_isas())
    message = f"InputError: RELLAX_ISA: expected a level that this machine can run ({known}), got '{isa}'"
    assert message in output.stderr


@pytest.mark.parametrize("source", sorted((CSRC / "kernels").glob("*.cpp")), ids=lambda path: path.stem)
def test_levels_share_nothing_that_the_linker_merges(source: Path, tmp_path: Path) -> None:
    """Of weak symbols of one name one copy is kept, which may be the one for the newest machine."""
    compiler, symbols = shutil.which("c++"), shutil.which("nm")
    if compiler is None or symbols is None:
        pytest.skip("needs a C++ compiler and nm")
    output = tmp_path / "kernels.o"
    flags = ["-std=c++17", "-O0", "-DRELLAX_LEVEL=some_level", f"-I{CSRC}"]  # -O0: nothing is inlined away
    subprocess.run([compiler, *flags, "-c", source, "-o", output], check=True)
    listing = subprocess.run([symbols, "-C", output], check=True, capture_output=True, text=True).stdout
    assert "rellax::some_level::" in listing
    weak = [line for line in listing.splitlines() if line.split(maxsplit=2)[-2] in {"W", "V", "u"}]
    assert [line for line in weak if "rellax::some_level::" not in line] == []
