from __future__ import annotations

import os
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test asks a hub for a model

import pytest
import torch

if not torch.cuda.is_available():
    # Read where a kernel is defined, Triton's own among them: before anything imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"

from workspace import Workspace, make_workspace


def _mend_interpreter() -> None:
    """Make loop bounds work in Triton 3.6's interpreter: it calls int() on arrays of one element, which numpy
    refuses from 2.4 on (https://github.com/triton-lang/triton/issues/9171)."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = mended


_mend_interpreter()


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
