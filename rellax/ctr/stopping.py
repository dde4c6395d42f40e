"""SIGTERM, by which schedulers, containers and systemd stop a process, ends a command as Ctrl-C does."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within it SIGTERM raises `Terminated`, and nothing is left half-written; a second one ends the process.

    It does nothing outside of the main thread, and in a process of torchrun's: that one may be waiting for
    the others in C++, where an exception would wait as well.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or "TORCHELASTIC_RUN_ID" in os.environ:
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _terminate(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated
