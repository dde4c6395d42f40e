from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test asks a hub for a model

import pytest
from workspace import Workspace, make_workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Prepared data, a tiny model, a CRM and retrieved behaviours; not to be changed."""
    return make_workspace(tmp_path_factory.mktemp("workspace"))
