"""The main job at once: every variant on the same test samples, as a table, a picture and a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from rellax._files import read_json, write_json
from rellax.ctr import metrics, report
from rellax.ctr.config import DemoConfig
from rellax.ctr.dataset import Dataset
from rellax.ctr.lab import Lab, Step, run_steps
from rellax.ctr.methods import METHODS

VARIANTS = (
    "zero-shot-recent",
    "zero-shot-retrieved",
    "lora-recent",
    "rella",
    "rella-spa",
    "rella-cflora",
    "rellax",
)
CRM = {"din-shots": "DIN", "sim-shots": "SIM", "din": "DIN", "sim": "SIM"}
TITLES = {name: METHODS[name].title for name in VARIANTS} | {
    "din-shots": "DIN, same shots",
    "sim-shots": "SIM, same shots",
    "din": "DIN, all training samples",
    "sim": "SIM, all training samples",
}


def demo(config: DemoConfig, out: str | Path, *, device: str = "auto", progress: bool = True) -> str:
    """Run everything and return the table as Markdown.

    `out` also gets report.md, report.html, auc.png and metrics.json.
    Steps that are finished in `out` are not repeated, so a demo that was stopped goes on where it was.

    Raises:
        InputError: no network at the first run, or `out` holds a demo of other sizes.
    """
    out = Path(out)
    lab = Lab(
        config, out, k=config.k, shots=config.shots, test_seed=config.seed, device=device, progress=progress
    )
    run_steps(_steps(config, lab), out / "steps.json")
    table = _report(config, lab, out)
    report.report(out, list(TITLES), out / "report.html", seed=config.seed, progress=progress)
    return table


def _steps(config: DemoConfig, lab: Lab) -> list[Step]:
    """All steps; a cost is in prompts scored, roughly."""
    steps = [Step("Data and language model", 60, lab.prepare)]
    for name, model in CRM.items():
        few = name.endswith("shots")
        run = partial(lab.crm, name, model, shots=config.shots if few else None, seed=config.seed)
        steps.append(Step(TITLES[name], 30 if few else 500, run))
    crm = _crm(config) if config.similarity == "text+crm" else None
    steps.append(Step("Item embeddings", 300, partial(lab.embed, crm)))
    steps.append(Step("Retrieval", 10, lab.retrieve))
    return steps + [Step(TITLES[name], *_run(config, lab, name)) for name in VARIANTS]


def _run(config: DemoConfig, lab: Lab, name: str) -> tuple[float, Callable[[], None]]:
    """Cost of a method, and what runs it."""
    method, test = METHODS[name], config.test_samples or 0
    if method.stage is None:
        return test, partial(lab.zero_shot, name, name, config.k)
    epochs = config.epochs2 if method.stage == "2" else config.epochs
    seen = config.shots * (2 if method.prompts == "mixture" else 1)
    return epochs * (3.5 * seen + (config.validation_samples or 0)) + test, partial(
        lab.train,
        name,
        name,
        k=config.k,
        shots=config.shots,
        seed=config.seed,
        start=method.start or "",
        crm=_crm(config),
    )


def _crm(config: DemoConfig) -> str:
    """The classical model that is read by whatever reads one."""
    return "din-shots" if config.few_shot_crm else "din"


def _report(config: DemoConfig, lab: Lab, out: Path) -> str:
    dataset = Dataset.load(out / "data")
    chosen = lab.test_samples(dataset)
    variants = []
    for name, title in TITLES.items():
        path = out / name / ("predictions.parquet" if name in CRM else "test/predictions.parquet")
        probabilities = pq.read_table(path)["probability"].to_numpy()
        if name in CRM:
            probabilities = probabilities[chosen]
        labels, users = dataset.samples.label[chosen], dataset.samples.user[chosen]
        result = metrics.evaluate(labels, probabilities, users)
        variants.append(report.Variant(name, title, labels, probabilities, users, result))
    write_json(out / "metrics.json", {variant.name: variant.metrics for variant in variants})
    report.write(out, variants, asdict(config), dataset.meta, read_json(out / "steps.json"))
    return report.table(variants)
