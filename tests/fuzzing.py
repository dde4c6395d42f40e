"""How long the property tests look, and what their errors have in common.

CI takes a few examples, the same in every run; ``RELLAX_FUZZ=2000 pytest tests/test_hypothesis_*.py`` takes
as many random ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, settings

from rellax.errors import InputError

_EXAMPLES = os.environ.get("RELLAX_FUZZ")
_SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]


def examples(count: int) -> settings:
    """`count` fixed examples, or as many random ones as RELLAX_FUZZ says."""
    return settings(
        max_examples=int(_EXAMPLES or count),
        derandomize=_EXAMPLES is None,
        database=None,
        deadline=None,
        suppress_health_check=_SLOW,
    )


@contextmanager
def one_sentence(*names: str) -> Iterator[None]:
    """Within: an `InputError` of one line that begins with one of `names`, if any are given."""
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    assert not names or message.split(":")[0] in names, message


@contextmanager
def at_most_one_sentence() -> Iterator[None]:
    """Within: nothing wrong, or an `InputError` of one line, which ends here."""
    try:
        yield
    except InputError as error:
        if "\n" in str(error):
            raise AssertionError(f"more than one line: {error}") from error
