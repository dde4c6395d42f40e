from __future__ import annotations

import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test asks a hub for a model

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Read where a kernel is defined, Triton's own among them: before anything imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"

from workspace import Workspace, make_workspace

from rellax.testing.interpreter import mend_interpreter

mend_interpreter()


@pytest.fixture(autouse=True)
def seed() -> None:
    """What a test draws without a generator of its own is the same in each run."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test draw from it
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend in turn, asked for by RELLAX_BACKEND: C++ on a CPU, Triton on a GPU or interpreted."""
    if request.param == "cpp" and torch.cuda.is_available():
        pytest.skip("the tensors are on a GPU")
    monkeypatch.setenv("RELLAX_BACKEND", request.param)
    return str(request.param)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Prepared data, a tiny model, a CRM and retrieved behaviours; not to be changed."""
    return make_workspace(tmp_path_factory.mktemp("workspace"))
