"""What MovieLens-25M takes: time and peak memory of `rellax prepare`, and of what training holds of the data.

python tests/measure_ml_25m.py /tmp/ml-25m [STEP …]    # 8 GB of synthetic files are made there

`crm` is `rellax crm` without the passes through its network: random numbers are what that hands out. `made`
writes what `rellax retrieve` would, with the most recent behaviours; `train` is the start of a run, with all
inputs that one can have and the default language model, up to the prompts of its first step.
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
print(f"{name}: {{seconds:.1f}} s, {{peak:.2f}} GiB at the peak, mapped files included", file=sys.stderr)
"""
_STEPS = {
    "import": "from rellax.ctr import cli, prepare",
    "prepare": "from rellax.ctr.cli import main\n"
    "assert main(['prepare', '--dataset', 'ml-25m', '--raw', '{folder}', '--work', '{folder}/work']) == 0",
    "load": "from rellax.ctr.dataset import Dataset\nDataset.load('{folder}/work/data')",
    "crm": """
import functools
import numpy as np
import torch
from rellax.ctr import crm
from rellax.ctr.config import CRMConfig
from rellax.ctr.dataset import Dataset
data = Dataset.load('{folder}/work/data')
def outputs(model, features, samples):
    for chunk in np.array_split(samples, len(samples) // 2048):
        yield torch.rand(len(chunk), 64), torch.rand(len(chunk))
crm._outputs, crm.evaluate = outputs, functools.partial(crm.evaluate, bootstrap=0)
crm.train_crm(data, '{folder}/work/crm', CRMConfig(shots=4096, epochs=1))
""",
    "made": """
import numpy as np
from rellax import subr
from rellax.ctr.dataset import Dataset
from rellax.ctr.prompts import recent
data = Dataset.load('{folder}/work/data')
samples = data.samples
keys = subr.user_keys(data.users['user_id'].to_pylist())
sample = samples.user, samples.position, samples.item
history = subr.history_keys(keys, data.behaviour_items, data.offsets, *sample)
schema = subr.retrieved_schema(10, int(np.diff(data.offsets).max()))
order = np.lexsort((samples.position, keys[samples.user])).astype(np.int32)
def blocks():
    for rows in np.array_split(order, 100):
        positions = recent(samples.position[rows], 10)
        found = subr.Retrieved(rows, keys[samples.user[rows]], history[rows], positions)
        yield subr.retrieved_table(found, schema)
subr.write_retrieved('{folder}/work/retrieved/retrieved.parquet', blocks(), schema)
""",
    "train": """
from rellax.ctr.assets import smollm2_135m
from rellax.ctr.config import TrainConfig
from rellax.ctr.train import _Trainer, train
def stop(self, rows, own):
    print([len(self.examples[row].input_ids) for row in rows], 'tokens')
    raise KeyboardInterrupt
_Trainer._backward = stop
folders = {{name: '{folder}/work/' + name for name in ('data', 'crm', 'retrieved')}}
parts = {{'stage': 'joint', 'interaction': 'full', 'soft_prompt': True}}
config = TrainConfig(**folders, **parts, model=str(smollm2_135m()), validation_samples=16)
try:
    train(config, '{folder}/work/run', redo=True)
except KeyboardInterrupt:
    pass
""",
}


def main(folder: Path, *steps: str) -> None:
    if not (folder / "ratings.csv").exists():
        write_full_ml_25m(folder, **ML_25M)
    for name in steps or _STEPS:
        code = _TIMED.format(name=name, body=_STEPS[name].format(folder=folder))
        subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
