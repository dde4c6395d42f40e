"""Nothing in the package can run code that a file brings along."""

from __future__ import annotations

import ast
import os
import pickle
from pathlib import Path

import pytest
from workspace import Workspace

import rellax
from rellax._files import sha256_file, write_json
from rellax.ctr.train import train
from rellax.errors import InputError

PACKAGE = Path(rellax.__file__).parent
FORBIDDEN = {
    *("eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.unsafe_load"),
    *("joblib.load", "dill.load", "dill.loads", "marshal.loads", "marshal.load", "shelve.open", "os.system"),
    *("pandas.read_pickle", "pd.read_pickle"),
}


def complaints(source: str) -> list[str]:
    """The calls in a Python source that could run what a file says."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name, options = ast.unparse(call.func), {k.arg: k.value for k in call.keywords}
        given = {key: getattr(value, "value", value) for key, value in options.items()}
        wrong = (
            name in FORBIDDEN
            or (name == "torch.load" and given.get("weights_only") is not True)
            or (name in ("np.load", "numpy.load") and given.get("allow_pickle", False) is not False)
            or ("trust_remote_code" in options and given.get("trust_remote_code") is not False)
            or ("shell" in options and given.get("shell") is not False)
        )
        found += [f"line {call.lineno}: {ast.unparse(call)}"] * wrong
    return found


def test_no_module_loads_pickles_or_runs_text() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    found = {file.name: complaints(file.read_text(encoding="utf-8")) for file in files}
    assert not {name: calls for name, calls in found.items() if calls}


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "pickle.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "yaml.load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_the_search_would_find_it(source: str) -> None:
    assert complaints(source)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_named_as_a_checkpoint_does_not_run(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.config(stage="1", crm=None, epochs=1, shots=4)
    trap = tmp_path / "trap"

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rellax.ctr.train._Trainer._train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", device="cpu", progress=False)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000001" / "state.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(pickle.dumps(Evil(trap)))
    write_json(checkpoint.parent / "checkpoint.json", {"best_step": None, "sha256": sha256_file(checkpoint)})
    with pytest.raises(InputError, match="expected a checkpoint, found something else"):
        train(config, tmp_path / "run", device="cpu", progress=False)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Evil(trap)))
    assert trap.exists()  # it would have
