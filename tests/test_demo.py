"""The demo in small: all variants in one table, resumed step by step, remarks that follow from numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from workspace import Workspace

from rellax.ctr import lab, metrics, report
from rellax.ctr.config import DemoConfig
from rellax.ctr.demo import TITLES, demo
from rellax.ctr.report import Variant
from rellax.errors import InputError


@pytest.fixture(scope="module")
def config(workspace: Workspace) -> DemoConfig:
    return DemoConfig(
        model=str(workspace.model),
        raw=str(workspace.root / "raw"),
        shots=6,
        k=3,
        test_samples=11,
        validation_samples=12,
        batch_size=4,
        crm_epochs=1,
    )


def test_all_variants_and_resuming(
    config: DemoConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="rellax")
    table = demo(config, tmp_path / "whole", progress=False)
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]] == list(TITLES.values())
    assert "[14/14] ReLLa + SPA + CFLoRA (ReLLaX)" in caplog.text
    text = (tmp_path / "whole" / "report.md").read_text()
    assert table in text
    assert "6 shots, K = 3 behaviours in a prompt (of retrieved ones 1 the most recent), 11 random" in text
    folder = tmp_path / "whole"
    assert json.loads((folder / "embeddings" / "config.json").read_text())["crm"] == str(folder / "din")
    assert json.loads((folder / "rella" / "config.json").read_text())["recent_share"] == 0.4
    assert (tmp_path / "whole" / "auc.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert set(saved) == set(TITLES)
    assert all(result["samples"] == 11 for result in saved.values())

    # Stopped in the middle and taken up again it is the same; what was finished is not done again.
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lab, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            demo(config, tmp_path / "stopped", progress=False)
    before = json.loads((tmp_path / "stopped" / "steps.json").read_text())
    assert len(before) == 9
    assert demo(config, tmp_path / "stopped", progress=False) == table
    after = json.loads((tmp_path / "stopped" / "steps.json").read_text())
    assert len(after) == 14
    assert {title: after[title] for title in before} == before

    with pytest.raises(InputError, match=r"holds a run with shots = 6, expected 7"):
        demo(dataclasses.replace(config, shots=7), tmp_path / "whole", progress=False)


def test_few_shot_crm(config: DemoConfig, tmp_path: Path) -> None:
    demo(dataclasses.replace(config, few_shot_crm=True, test_samples=99), tmp_path, progress=False)
    for name in ("rellax", "embeddings"):
        assert json.loads((tmp_path / name / "config.json").read_text())["crm"] == str(tmp_path / "din-shots")
    report = (tmp_path / "report.md").read_text()
    assert "they know no more than the shots" in report
    assert "12 random test samples" in report  # all that there are


def test_more_shots_than_there_are(config: DemoConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"shots: expected 1 to \d+ samples of split 'train', got 999"):
        demo(dataclasses.replace(config, shots=999), tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_retrieval_by_text_alone(config: DemoConfig, tmp_path: Path) -> None:
    text = dataclasses.replace(config, similarity="text", recent_share=0.0)
    demo(text, tmp_path, progress=False)
    assert json.loads((tmp_path / "embeddings" / "config.json").read_text()).get("crm") is None
    report = (tmp_path / "report.md").read_text()
    assert "K = 3 behaviours in a prompt, 11 random" in report
    assert "- SPA and CFLoRA read a DIN that was trained on all training samples" in report
    with pytest.raises(InputError, match=r"similarity: expected one of text, text\+crm, got 'crm'"):
        DemoConfig(similarity="crm")


def variants(quality: dict[str, float]) -> list[Variant]:
    """Variants whose scores hold `quality` times the label beside noise."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, size=400)
    noise, users = rng.normal(size=400), np.arange(400) // 2
    result = []
    for name, strength in quality.items():
        probabilities = 1 / (1 + np.exp(-(noise + strength * (labels - 0.5))))
        values = metrics.evaluate(labels, probabilities, users)
        result.append(Variant(name, TITLES[name], labels, probabilities, users, values))
    return result


def test_remarks_follow_from_the_numbers() -> None:
    quality = {"zero-shot-recent": 0.0, "lora-recent": 1.5, "rella": 1.5, "rella-spa": 0.5}
    found = report.remarks(variants(quality), {"few_shot_crm": False, "similarity": "text+crm"})
    assert found[0].startswith("Training (LoRA on recent prompts): AUC +0.")
    assert found[0].endswith(", higher.")
    assert found[1] == "Retrieval and the mixture: AUC +0.000 [+0.000, +0.000], no clear difference."
    assert found[2].startswith("SPA on top of ReLLa: AUC -0.")
    assert found[2].endswith(", lower.")
    assert found[3].startswith("Highest AUC here: LoRA on recent prompts. With 400 test samples")
    assert found[4].startswith(
        "Retrieval, SPA and CFLoRA read a DIN that was trained on all training samples"
    )
    assert "through it they know more than the shots" in found[4]


def test_a_table_without_auc() -> None:
    labels, probabilities = np.ones(4, dtype=int), np.array([0.2, 0.6, 0.7, 0.9])
    values = metrics.evaluate(labels, probabilities, bootstrap=0)
    one = Variant("din", "DIN", labels, probabilities, np.arange(4), values)
    assert report.table([one]).splitlines()[2] == "| DIN | - | 0.646 | 0.750 |"
