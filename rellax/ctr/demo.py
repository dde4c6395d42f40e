"""The main job at once: every variant on the same test samples, as a table, a picture and a report."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import pyarrow.parquet as pq

from rellax._files import read_json, write_json
from rellax.ctr import assets, metrics, report, runs
from rellax.ctr.config import DemoConfig, TrainConfig
from rellax.ctr.crm import CRMConfig, train_crm
from rellax.ctr.dataset import Dataset
from rellax.ctr.embedding import embed
from rellax.ctr.evaluate import evaluate, evaluate_zero_shot
from rellax.ctr.llm import resolve_device
from rellax.ctr.prepare import prepare
from rellax.ctr.retrieval import retrieve
from rellax.ctr.sources import read_ml_100k
from rellax.ctr.train import train

logger = logging.getLogger(__name__)

ZERO_SHOT = {"zero-shot-recent": "recent", "zero-shot-retrieved": "retrieved"}
STAGE_1 = {"lora-recent": "recent", "rella": "mixture"}
STAGE_2 = {
    "rella-spa": {"soft_prompt": True, "interaction": "none"},
    "rella-cflora": {"soft_prompt": False, "interaction": "full"},
    "rellax": {"soft_prompt": True, "interaction": "full"},
}
CRM = {"din-shots": "DIN", "sim-shots": "SIM", "din": "DIN", "sim": "SIM"}
TITLES = {
    "zero-shot-recent": "Zero-shot LLM, K most recent",
    "zero-shot-retrieved": "Zero-shot LLM, K retrieved (SUBR)",
    "lora-recent": "LoRA on recent prompts",
    "rella": "LoRA on the mixture (ReLLa)",
    "rella-spa": "ReLLa + SPA",
    "rella-cflora": "ReLLa + CFLoRA",
    "rellax": "ReLLa + SPA + CFLoRA (ReLLaX)",
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
    return _Demo(config, Path(out), device, progress).run()


@dataclass(frozen=True)
class _Step:
    """`cost` is in prompts scored, roughly: for the estimate of the rest alone."""

    title: str
    cost: float
    run: Callable[[], Any]


class _Demo:
    def __init__(self, config: DemoConfig, out: Path, device: str, progress: bool) -> None:
        self.config, self.out, self.device, self.progress = config, out, device, progress
        self.model = config.model
        self.times: dict[str, dict[str, float]] = {}

    def run(self) -> str:
        path = self.out / "steps.json"
        self.times = read_json(path) if path.exists() else {}
        steps = self._steps()
        left, spent, seconds = sum(step.cost for step in steps), 0.0, 0.0
        for number, step in enumerate(steps, start=1):
            rest = f", about {max(1, round(left * seconds / spent / 60))} min left" if seconds > 5 else ""
            logger.info("[%d/%d] %s%s", number, len(steps), step.title, rest)
            started = monotonic()
            step.run()
            took = monotonic() - started
            left -= step.cost
            if step.title not in self.times:
                spent, seconds = spent + step.cost, seconds + took
                self.times[step.title] = {
                    "seconds": round(took, 1),
                    "peak_gib": round(runs.peak_memory_gib(), 2),
                }
                write_json(path, self.times)
        return self._report()

    def _steps(self) -> list[_Step]:
        config = self.config
        validation, test = config.validation_samples, config.test_samples
        steps = [
            _Step("Data and language model", 60, self._prepare),
            _Step("Item embeddings", 300, self._embed),
            _Step("Retrieval", 10, self._retrieve),
        ]
        for name, model in CRM.items():
            cost = 30.0 if name.endswith("shots") else 500.0
            steps.append(_Step(TITLES[name], cost, partial(self._crm, name, model)))
        for name, prompts in ZERO_SHOT.items():
            steps.append(_Step(TITLES[name], test, partial(self._zero_shot, name, prompts)))
        for name, prompts in STAGE_1.items():
            prompts_seen = config.shots * (2 if prompts == "mixture" else 1)
            cost = config.epochs * (3.5 * prompts_seen + validation) + test
            steps.append(_Step(TITLES[name], cost, partial(self._stage_1, name, prompts)))
        for name, parts in STAGE_2.items():
            cost = config.epochs2 * (3.5 * config.shots + validation) + test
            steps.append(_Step(TITLES[name], cost, partial(self._stage_2, name, parts)))
        return steps

    def _prepare(self) -> None:
        if self.model is None:
            self.model = str(assets.smollm2_135m())
        if not (self.out / "data" / "dataset.json").exists():
            raw = assets.movielens_100k() if self.config.raw is None else self.config.raw
            prepare(read_ml_100k(raw), self.out / "data")

    def _embed(self) -> None:
        config = {"data": self._path("data"), "model": self.model, "dim": 512}
        embed(config, self.out / "embeddings", device=self.device, progress=self.progress)

    def _retrieve(self) -> None:
        config = {"data": self._path("data"), "embeddings": self._path("embeddings"), "k": self.config.k}
        retrieve(config, self.out / "retrieved")

    def _crm(self, name: str, model: str) -> None:
        shots = self.config.shots if name.endswith("shots") else None
        config = CRMConfig(model=model, shots=shots, epochs=self.config.crm_epochs, seed=self.config.seed)
        if not runs.is_claimed(self.out / name, asdict(config)):
            device = str(resolve_device(self.device))
            train_crm(Dataset.load(self.out / "data"), self.out / name, config, device=device)

    def _zero_shot(self, name: str, prompts: str) -> None:
        evaluate_zero_shot(
            self._train_config(prompts=prompts),
            self.out / name / "test",
            samples=self.config.test_samples,
            seed=self.config.seed,
            device=self.device,
            progress=self.progress,
        )

    def _stage_1(self, name: str, prompts: str) -> None:
        config = self.config
        self._train(name, self._train_config(prompts=prompts, epochs=config.epochs, lr=config.lr))

    def _stage_2(self, name: str, parts: dict[str, Any]) -> None:
        config = self.config
        crm = self._path("din-shots" if config.few_shot_crm else "din")
        self._train(
            name,
            self._train_config(
                stage="2",
                start=self._path("rella"),
                crm=crm,
                prompts="retrieved",
                epochs=config.epochs2,
                lr=config.lr2,
                **parts,
            ),
        )

    def _train(self, name: str, config: TrainConfig) -> None:
        folder = self.out / name
        train(config, folder, device=self.device, progress=self.progress)
        test_samples, seed = self.config.test_samples, self.config.seed
        evaluate(folder, samples=test_samples, seed=seed, device=self.device, progress=self.progress)

    def _train_config(self, **changes: Any) -> TrainConfig:
        config = self.config
        assert self.model is not None, "the first step sets it"
        return TrainConfig(
            data=self._path("data"),
            model=self.model,
            retrieved=self._path("retrieved"),
            k=config.k,
            shots=config.shots,
            validation_samples=config.validation_samples,
            batch_size=config.batch_size,
            seed=config.seed,
            **changes,
        )

    def _path(self, name: str) -> str:
        return str(self.out / name)

    def _report(self) -> str:
        dataset = Dataset.load(self.out / "data")
        chosen = dataset.choose("test", self.config.test_samples, self.config.seed)
        variants = []
        for name, title in TITLES.items():
            path = self.out / name / ("predictions.parquet" if name in CRM else "test/predictions.parquet")
            table = pq.read_table(path)
            probabilities = table["probability"].to_numpy()
            if name in CRM:
                probabilities = probabilities[chosen]
            labels = dataset.samples.label[chosen]
            result = metrics.evaluate(labels, probabilities, dataset.samples.user[chosen])
            variants.append(report.Variant(name, title, labels, probabilities, result))
        write_json(self.out / "metrics.json", {variant.name: variant.metrics for variant in variants})
        report.write(self.out, variants, asdict(self.config), dataset.meta, self.times)
        report.report(
            self.out, list(TITLES), self.out / "report.html", seed=self.config.seed, progress=self.progress
        )
        return report.table(variants)
