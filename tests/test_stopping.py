"""SIGTERM: what a command leaves, what it says, and that it reaches processes beside it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rellax._files import atomic_folder
from rellax.ctr import cli
from rellax.ctr.stopping import Terminated, stoppable


def test_a_command_ends_as_after_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def terminated(_: object) -> None:
        with atomic_folder(tmp_path / "run"):
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(cli._COMMANDS, "train", terminated)
    assert cli.main(["train", "x"]) == 143
    assert capsys.readouterr().err == "\nrellax: stopped; the same command goes on from where it was\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_second_one_ends_the_process() -> None:
    program = "import os, signal; from rellax.ctr.stopping import stoppable\n"
    program += "with stoppable():\n try: os.kill(os.getpid(), signal.SIGTERM)\n"
    program += " except KeyboardInterrupt: os.kill(os.getpid(), signal.SIGTERM)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGTERM


def test_where_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def look() -> None:
        with stoppable():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    look()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    look()
    assert [handler == before for handler in found] == [True, True, False]
    with pytest.raises(Terminated), stoppable():
        signal.raise_signal(signal.SIGTERM)


STEPS = """
import sys, time
from functools import partial
from pathlib import Path
from rellax._files import atomic_folder
from rellax.ctr.lab import Step, run_steps
from rellax.ctr.stopping import Terminated, stoppable

def work(folder):
    with atomic_folder(folder):
        time.sleep(3600)

if __name__ == "__main__":
    here = Path(sys.argv[1])
    try:
        with stoppable():
            steps = [Step(name, 1.0, partial(work, here / name)) for name in "ab"]
            run_steps(steps, here / "steps.json", jobs=2)
    except Terminated:
        sys.exit(143)
"""


def test_steps_side_by_side_end_too(tmp_path: Path) -> None:
    script, folder = tmp_path / "steps.py", tmp_path / "runs"
    script.write_text(STEPS, encoding="utf-8")
    folder.mkdir()
    process = subprocess.Popen([sys.executable, str(script), str(folder)])
    while len(list(folder.iterdir())) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(300) == 143
    assert list(folder.iterdir()) == []
