"""Saved adapters: what comes back, and what is refused with the model untouched."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file, save_file
from test_patch import snapshot
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from rellax._files import sha256_file
from rellax.errors import InputError
from rellax.patch import SoftPromptConfig, export_peft, load_adapter, patch_model, save_adapter, unpatch_model
from rellax.patch.adapter import is_of_other_weights


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    """A patched model with random new parameters, and its adapter."""
    model = tiny.patched(tiny.base_model(), loss="vocab", interaction="diagonal")
    save_adapter(model, tmp_path / "adapter")
    return model, tmp_path / "adapter"


def loss(model: Any, *, placeholders: bool = True) -> torch.Tensor:
    return model(**tiny.batch(tiny.instances(placeholders=placeholders))).loss


def test_an_unpatched_model_is_patched_and_loaded(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    loaded = load_adapter(tiny.base_model(), folder)
    assert torch.equal(loss(loaded), loss(model))
    assert loaded.rellax.config == model.rellax.config
    assert sorted(file.name for file in folder.iterdir()) == ["adapter.json", "adapter.safetensors"]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_patched_model_is_loaded(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    other = tiny.patched(tiny.base_model(), interaction="diagonal", dropout=0.5)
    tiny.randomise(other, seed=7)
    other.rellax.soft_prompt.item_embeddings.zero_()
    other.eval()
    other.rellax.soft_prompt.cache_table()
    with pytest.warns(UserWarning, match="adapter: expected one trained with loss 'choice', got 'vocab'"):
        load_adapter(other, folder)
    with torch.no_grad():  # a table cached before would show here
        arguments = tiny.batch(tiny.instances(), answers=False)
        assert torch.equal(other(**arguments).logits, model.eval()(**arguments).logits)


def test_base_weights_are_not_saved(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    tensors = load_file(folder / "adapter.safetensors")
    assert set(tensors) == set(tiny.trainable(model)) | {"rellax.soft_prompt.item_embeddings"}


def test_saving_again_replaces_the_folder(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    tiny.randomise(model, seed=11)
    save_adapter(model, folder)
    assert torch.equal(loss(load_adapter(tiny.base_model(), folder)), loss(model))
    assert list(folder.parent.iterdir()) == [folder]


def test_an_empty_folder_and_a_link_to_one(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = saved
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    save_adapter(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "empty") == contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model", "model: expected a new folder, or one of .* alone, found config.json in it"),
        ("beside", "found tokenizer.json in it"),
        ("inside", "found adapter.json in it"),
        ("file", "file: expected a new folder, found a file"),
        (".", "expected another folder than the current one"),
    ],
)
def test_saving_replaces_nothing_but_an_adapter(
    saved: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    model, folder = saved
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("weights")
    (tmp_path / "model" / "config.json").write_text("{}")
    save_adapter(model, tmp_path / "beside")
    (tmp_path / "beside" / "tokenizer.json").write_text("{}")
    (tmp_path / "inside" / "adapter.json").mkdir(parents=True)
    (tmp_path / "inside" / "adapter.json" / "thesis").write_text("long")
    (tmp_path / "file").write_text("long")
    monkeypatch.chdir(folder if name == "." else tmp_path)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=message):
        save_adapter(model, name)
    assert contents(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "model", "beside", "inside", "file"}


def test_an_adapter_takes_the_place_of_another_at_once(
    saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No moment is without one, in which a reader would find none and a kill would leave none."""
    model, folder = saved
    before = contents(folder)

    def never(self: Path, target: Path) -> Path:
        assert target != folder, "the folder's name was free for a while"
        return self.rename(target)

    monkeypatch.setattr(Path, "replace", never)
    tiny.randomise(model, seed=11)
    save_adapter(model, folder)
    assert contents(folder).keys() == before.keys()
    assert contents(folder) != before
    assert list(folder.parent.iterdir()) == [folder]


def test_the_older_adapter_comes_back_where_saving_fails(
    saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved
    before, replace = contents(folder), Path.replace

    def fails(self: Path, target: Path) -> Path:
        if target == folder and not self.name.endswith(".old"):
            assert not folder.exists()
            raise OSError("no space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fails)
    monkeypatch.setattr("rellax._files._exchange", lambda a, b: False)  # as where the system has no such call
    tiny.randomise(model, seed=11)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(model, folder)
    assert contents(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_whole_model_is_pickled(tmp_path: Path) -> None:
    model = tiny.patched(tiny.base_model())
    arguments = tiny.batch(tiny.instances())
    expected = model(**arguments).loss
    torch.save((model, arguments), tmp_path / "model.pt")
    load = "import torch; model, arguments = torch.load('model.pt', weights_only=False); "
    run = load + "torch.save(model(**arguments).loss, 'loss.pt')"
    subprocess.run([sys.executable, "-c", run], cwd=tmp_path, check=True)
    assert torch.equal(torch.load(tmp_path / "loss.pt"), expected)

    loaded, _ = torch.load(tmp_path / "model.pt", weights_only=False)
    tiny.randomise(loaded, seed=9)
    assert not torch.equal(loss(loaded), expected)
    assert torch.equal(loss(model), expected)
    original = [type(module) for module in tiny.base_model().modules()]
    assert [type(module) for module in unpatch_model(loaded).modules()] == original


def whole(folder: Path) -> Any:
    """The model that a patched one's `save_pretrained` wrote."""
    return load_adapter(AutoModelForCausalLM.from_pretrained(folder), folder).eval()


def test_a_whole_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny.patched(tiny.base_model("llama-tied", dtype=torch.float32)).eval()
    model.save_pretrained(tmp_path / "model")
    arguments = tiny.batch(tiny.instances(), answers=False)
    with torch.no_grad():
        assert torch.equal(whole(tmp_path / "model")(**arguments).logits, model(**arguments).logits)
    tiny.randomise(model, seed=5)
    model.save_pretrained(tmp_path / "model")  # again
    with torch.no_grad():
        assert torch.equal(whole(tmp_path / "model")(**arguments).logits, model(**arguments).logits)
    load_adapter(model, tmp_path / "model")
    unpatch_model(model).save_pretrained(tmp_path / "plain")
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_one_process_alone_writes_the_adapter_of_a_whole_model(tmp_path: Path) -> None:
    model = tiny.patched(tiny.base_model())
    model.save_pretrained(tmp_path / "model", is_main_process=False)
    assert not (tmp_path / "model" / "rellax").exists()


def test_a_whole_model_is_saved_from_a_state_dict(tmp_path: Path) -> None:
    """As `Trainer` does where each process holds a part of the tensors."""
    model = tiny.patched(tiny.base_model(dtype=torch.float32))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in tiny.trainable(model).values():
            parameter.zero_()
    model.save_pretrained(tmp_path / "model", state_dict=dict(state))  # which it empties
    saved = load_file(tmp_path / "model" / "rellax" / "adapter.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in saved.items())
    model.save_pretrained(tmp_path / "part", state_dict={"lm_head.weight": state["lm_head.weight"]})
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not any((tmp_path / name / "rellax").exists() for name in ("part", "other"))


def test_a_wrapped_model_is_saved_and_loaded(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = saved
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for number, wrap in enumerate((torch.compile, DistributedDataParallel)):
            save_adapter(wrap(model), tmp_path / str(number))
            assert contents(tmp_path / str(number)) == contents(folder)
            other = tiny.patched(tiny.base_model(), loss="vocab", interaction="diagonal")
            tiny.randomise(other, seed=7)
            wrapped = wrap(other)
            assert load_adapter(wrapped, folder) is wrapped
            assert torch.equal(loss(other), loss(model))
        with pytest.raises(InputError, match=r"got .*DistributedDataParallel"):
            load_adapter(DistributedDataParallel(tiny.base_model()), folder)
    finally:
        torch.distributed.destroy_process_group()


def test_stage_two_starts_from_stage_one(tmp_path: Path) -> None:
    first = tiny.patched(tiny.base_model(), soft_prompt=False, interaction="none")
    save_adapter(first, tmp_path / "stage1")
    second = patch_model(
        tiny.base_model(), tiny.config(gate_init="identity"), soft_prompt=tiny.soft_prompt_config()
    )
    before = {name: p.clone() for name, p in second.rellax.named_parameters()}
    with pytest.raises(InputError, match=r"expected rellax.gate_bank.b1, it lacks that tensor \(11 in all\)"):
        load_adapter(second, tmp_path / "stage1")
    load_adapter(second, tmp_path / "stage1", partial=True)
    arguments = tiny.batch(tiny.instances(placeholders=False))
    gated = second(**arguments).loss
    del arguments["instance_embed"]
    torch.testing.assert_close(gated, first(**arguments).loss)
    assert all(torch.equal(p, before[name]) for name, p in second.rellax.named_parameters())


def _edit(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        file = folder / "adapter.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _flip_a_byte(folder: Path) -> None:
    file = folder / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def _cut(name: str) -> Any:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def _tensors(edit: Any) -> Any:
    """Change the tensors of an adapter, with a matching checksum."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "adapter.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter.safetensors")
        _edit(sha256=sha256_file(folder / "adapter.safetensors"))(folder)

    return change


@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_flip_a_byte, "adapter.safetensors: damaged"),
        (_cut("adapter.safetensors"), "adapter.safetensors: damaged"),
        (_cut("adapter.json"), "adapter.json: expected JSON"),
        (lambda folder: (folder / "adapter.safetensors").unlink(), "expected a file of tensors, found none"),
        (lambda folder: (folder / "adapter.json").unlink(), "expected a JSON file, found none"),
        (lambda folder: (folder / "adapter.json").write_text("[]"), "expected the fields"),
        (_edit(format=99), "expected format 1, got 99"),
        (_edit(base_model=[]), r"adapter.json: expected the fields \['base_model', 'config', "),
        (_edit(base_weights={"layers": 3}), "base_weights: expected strings by name, got {'layers': 3}"),
        (_edit(config={"rank": 3}), r"expected fields out of .* got \['rank'\]"),
        (_tensors(lambda t: t.pop("rellax.gate_bank.w2")), "expected rellax.gate_bank.w2, it lacks"),
        (_tensors(lambda t: t.update(x=torch.ones(1))), "expected no x, the model lacks it"),
        (_tensors(lambda t: t.update({"rellax.gate_bank.w2": torch.ones(2)})), r"w2 of shape .*, got \(2,\)"),
        (
            _tensors(lambda t: t.pop("rellax.soft_prompt.item_embeddings")),
            "rellax.soft_prompt.item_embeddings",
        ),
    ],
)
def test_damaged_adapters(saved: tuple[Any, Path], patched: bool, change: Any, message: str) -> None:
    _, folder = saved
    change(folder)
    model = tiny.base_model()
    if patched:
        tiny.patched(model, interaction="diagonal")
    _refused(model, folder, message)


def _refused(model: Any, folder: Path, message: str) -> None:
    before, values = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        load_adapter(model, folder)
    assert snapshot(model) == before
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny.base_model("qwen2"), "expected one of .*Qwen2ForCausalLM.* got one of .*Llama"),
        (lambda: tiny.patched(tiny.base_model(), r=2, interaction="diagonal"), r"lora_a of shape \(2, 40\)"),
        (lambda: tiny.patched(tiny.base_model()), r"gate_bank.b2 of shape \(6, 9\), got \(6, 3\)"),
        (
            lambda: tiny.patched(tiny.base_model(), target_modules=["q_proj"]),
            "expected no .*, the model lacks it",
        ),
        (
            lambda: tiny.patched(tiny.base_model(), soft_prompt=False, interaction="diagonal"),
            "expected no rellax.soft",
        ),
        (
            lambda: tiny.patched(tiny.base_model(), alpha=6, interaction="diagonal"),
            "expected one with alpha = 6, got 5",
        ),
        (
            lambda: tiny.patched(tiny.base_model(), answer_ids=(tiny.YES, tiny.NO), interaction="diagonal"),
            r"expected one with answer_ids \(7, 4\), got \(4, 7\)",
        ),
        (
            lambda: patch_model(
                tiny.base_model(),
                tiny.config(interaction="diagonal"),
                soft_prompt=SoftPromptConfig(tiny.soft_prompt_config().item_embeddings, (3,)),
            ),
            r"expected one with placeholder_ids \[3\], got \[60, 70\]",
        ),
    ],
    ids=["model", "rank", "interaction", "targets", "soft-prompt", "alpha", "answers", "placeholders"],
)
def test_adapters_of_something_else(saved: tuple[Any, Path], make: Any, message: str) -> None:
    _refused(make(), saved[1], message)


DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_weights_in_another_dtype(tmp_path: Path, patched: bool, dtype: torch.dtype) -> None:
    save_adapter(tiny.patched(tiny.base_model(dtype=torch.float32)), tmp_path / "adapter")
    model = tiny.base_model(dtype=torch.float32).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(tiny.patched(model) if patched else model, tmp_path / "adapter")


def hub(model: Any, name: str, commit: str) -> Any:
    model.config._name_or_path, model.config._commit_hash = name, commit
    return model


@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
def test_other_weights_of_the_same_shapes(tmp_path: Path, patched: bool) -> None:
    save_adapter(tiny.patched(hub(tiny.base_model(), "org/base", "1a2b")), tmp_path / "adapter")
    model = tiny.base_model(seed=1)
    words = r"adapter: expected the base weights that it was trained on \(org/base at 1a2b\), got others"
    with pytest.warns(UserWarning, match=words) as caught:
        load_adapter(tiny.patched(model) if patched else model, tmp_path / "adapter")
    assert caught[0].filename == __file__


def test_where_weights_cannot_be_compared_names_are(tmp_path: Path) -> None:
    save_adapter(
        tiny.patched(hub(tiny.base_model(dtype=torch.float16), "org/base", "1a2b")), tmp_path / "adapter"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(hub(tiny.base_model(), "org/base", "1a2b"), tmp_path / "adapter")
        load_adapter(tiny.base_model(), tmp_path / "adapter")
    for other in (hub(tiny.base_model(), "org/base", "ffff"), hub(tiny.base_model(), "org/chat", "1a2b")):
        with pytest.warns(UserWarning, match="adapter: expected the base weights"):
            load_adapter(other, tmp_path / "adapter")


def test_what_is_noted_of_the_base(tmp_path: Path) -> None:
    def noted(model: Any) -> Any:
        save_adapter(tiny.patched(model), tmp_path / "adapter")
        return json.loads((tmp_path / "adapter" / "adapter.json").read_text())["base_weights"]

    local = noted(hub(tiny.base_model(), "/home/me/secret", "1a2b"))
    assert local.keys() == {"embeddings", "layers"}
    assert noted(hub(tiny.base_model(), "org/base", "1a2b")) == local | {"name": "org/base", "commit": "1a2b"}
    with pytest.warns(UserWarning, match="dropped"):
        export_peft(tmp_path / "adapter", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"


def test_an_adapter_that_notes_nothing_of_the_base(saved: tuple[Any, Path]) -> None:
    file = saved[1] / "adapter.json"
    noted = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in noted.items() if name != "base_weights"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(tiny.base_model(seed=1), saved[1])


def test_a_wider_vocabulary_is_another_model(saved: tuple[Any, Path]) -> None:
    model = tiny.base_model()
    model.resize_token_embeddings(64)
    _refused(model, saved[1], "'vocab_size': 64.* got one of .*'vocab_size': 61")


def _edit_config(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        config = json.loads((folder / "adapter.json").read_text())["config"]
        _edit(config=config | changes)(folder)

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 2}, r"expected lora_a of rank r = 2, got \[3\]"),
        ({"target_modules": ["q_proj"]}, r"expected layers named \['q_proj'\], got \["),
        ({"cond_dim": 9}, "expected gates for cond_dim = 9, got shape"),
    ],
    ids=["rank", "targets", "cond_dim"],
)
def test_a_configuration_of_other_tensors(
    saved: tuple[Any, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Which PEFT would take for those beside it."""
    _edit_config(**changes)(saved[1])
    _refused(tiny.base_model(), saved[1], message)
    with pytest.raises(InputError, match=message):
        export_peft(saved[1], tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_a_configuration_of_gates_that_are_not_there(tmp_path: Path) -> None:
    save_adapter(tiny.patched(tiny.base_model(), interaction="none"), tmp_path / "adapter")
    _edit_config(interaction="full")(tmp_path / "adapter")
    _refused(tiny.base_model(), tmp_path / "adapter", "expected gates for interaction 'full', it lacks them")


def test_an_adapter_with_all_parts_may_be_loaded_as_a_part(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    other = tiny.patched(tiny.base_model(), loss="vocab", interaction="diagonal")
    tiny.randomise(other, seed=9)
    assert not torch.equal(loss(other), loss(model))
    assert torch.equal(loss(load_adapter(other, folder, partial=True)), loss(model))


def test_an_adapter_beside_that_of_a_whole_model(saved: tuple[Any, Path]) -> None:
    """A folder's own comes before one that lies in it."""
    model, folder = saved
    save_adapter(tiny.patched(tiny.base_model(), loss="vocab"), folder / "rellax")
    assert torch.equal(loss(load_adapter(tiny.base_model(), folder)), loss(model))


def test_weights_of_another_kind_of_model_are_not_called_other_ones(saved: tuple[Any, Path]) -> None:
    """What does not fit is named by `load_adapter`."""
    for model, is_other in (
        (tiny.base_model(), False),
        (tiny.base_model(seed=1), True),
        (tiny.base_model("qwen2"), False),
    ):
        assert is_of_other_weights(model, saved[1]) == is_other


def test_fewer_decoder_layers_are_another_model(saved: tuple[Any, Path]) -> None:
    model = tiny.base_model()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    _refused(model, saved[1], "'layers': 1.* got one of .*'layers': 2")


def test_saving_an_unpatched_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a patched model"):
        save_adapter(tiny.base_model(), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
