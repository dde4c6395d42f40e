"""What MovieLens-25M takes: time and peak memory of `rellax prepare`, and of what training holds of the data.

python tests/measure_ml_25m.py /tmp/ml-25m [STEP …]    # 0.7 GB of synthetic files are made there first
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
    "examples": "from rellax.ctr.assets import smollm2_135m\n"
    "from rellax.ctr.dataset import Dataset\n"
    "from rellax.ctr.llm import load_tokenizer\n"
    "from rellax.ctr.prompts import PromptBuilder\n"
    "from rellax.ctr.task import Examples, Inputs\n"
    "data = Dataset.load('{folder}/work/data')\n"
    "prompts = PromptBuilder(load_tokenizer(str(smollm2_135m())), data, k=10, max_tokens=512)\n"
    "train = data.indices('train')\n"
    "examples = Examples(prompts, Inputs(data), train, train < 0)\n"
    "print(len(examples), 'prompts of', examples.lengths().mean(), 'tokens', examples[-1].label)",
}


def main(folder: Path, *steps: str) -> None:
    if not (folder / "ratings.csv").exists():
        write_full_ml_25m(folder, **ML_25M)
    for name in steps or _STEPS:
        code = _TIMED.format(name=name, body=_STEPS[name].format(folder=folder))
        subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
