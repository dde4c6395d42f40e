"""In a dry run (RELLAX_DRY=1) benchmarks only show that they run: small sizes, and few of their settings."""

from __future__ import annotations

import pytest
from sizes import DRY, dry


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep, of each benchmark, as few settings as show each value of each parameter at least once."""
    if not DRY:
        return
    seen, kept, rest = set(), [], []
    for item in items:
        if getattr(item.module, "dry", None) is not dry:
            item.add_marker(pytest.mark.skip(reason="it has no sizes for a dry run"))
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        values = {(item.function, name, repr(value)) for name, value in {"": None, **parameters}.items()}
        (rest if values <= seen else kept).append(item)
        seen |= values
    items[:] = kept
    config.hook.pytest_deselected(items=rest)
