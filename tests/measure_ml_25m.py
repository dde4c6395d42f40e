"""What MovieLens-25M takes: time and peak memory of `rellax prepare`, and of what training holds of the data.

python tests/measure_ml_25m.py /tmp/ml-25m    # synthetic files of the full size, 0.7 GB, are made there first
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from raw_data import ML_25M, write_full_ml_25m

_TIMED = """
import re, sys, time
started = time.monotonic()
{body}
seconds = time.monotonic() - started
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 2**20
print(f"{name}: {{seconds:.1f}} s, {{peak:.2f}} GiB at the peak", file=sys.stderr)
"""
_STEPS = {
    "import": "from rellax.ctr import cli, prepare",
    "prepare": "from rellax.ctr.cli import main\n"
    "assert main(['prepare', '--dataset', 'ml-25m', '--raw', '{folder}', '--work', '{folder}/work']) == 0",
    "load": "from rellax.ctr.dataset import Dataset\nDataset.load('{folder}/work/data')",
}


def main(folder: Path) -> None:
    if not (folder / "ratings.csv").exists():
        write_full_ml_25m(folder, **ML_25M)
    for name, body in _STEPS.items():
        code = _TIMED.format(name=name, body=body.format(folder=folder))
        subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
