"""The page of `rellax report`: its numbers, what it says of missing parts, how a browser shows it."""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from workspace import GATED, Workspace

from rellax._files import sha256_file
from rellax.ctr import cli, metrics
from rellax.ctr.dataset import Dataset
from rellax.ctr.evaluate import evaluate, evaluate_zero_shot
from rellax.ctr.llm import load_model
from rellax.ctr.report import gates as gates_module
from rellax.ctr.report import quality, report, retrieved
from rellax.ctr.report.charts import Axis
from rellax.ctr.report.material import Material, gather
from rellax.ctr.train import train
from rellax.patch import load_adapter

HOSTILE = "<script>alert('x')</script> & \"quoted\" \0"
SECTIONS = ("metrics", "roc", "calibration", "training", "history", "retrieval", "gates", "runs")
GATED_RUN = "gated <b>&"
SAMPLES = 9
BROWSER = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def work(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder whose data try to break out of the page, with runs of every kind."""
    work = tmp_path_factory.mktemp("report")
    for name in ("data", "crm", "embeddings", "retrieved"):
        shutil.copytree(workspace.root / name, work / name)
    items = pq.read_table(work / "data" / "items.parquet")
    for column in ("title", "text"):
        values = [f"{HOSTILE}{value}" for value in items[column].to_pylist()]
        items = items.set_column(items.column_names.index(column), column, pa.array(values))
    pq.write_table(items, work / "data" / "items.parquet")
    own = {name: str(work / name) for name in ("data", "crm", "retrieved")}
    config = workspace.config(**own, epochs=1)
    gated = dataclasses.replace(config, stage="joint", lr=0.05, crm_logit=True, recent_share=0.4, **GATED)
    train(gated, work / GATED_RUN, device="cpu", progress=False)
    train(dataclasses.replace(config, crm=None), work / "rella", device="cpu", progress=False)
    evaluate(work / GATED_RUN, samples=SAMPLES, device="cpu", progress=False)
    plain = dataclasses.replace(config, crm=None, retrieved=None, prompts="recent")
    evaluate_zero_shot(plain, work / "zero" / "test", samples=SAMPLES, device="cpu", progress=False)
    return work


@pytest.fixture(scope="module")
def page(work: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    report(work, [GATED_RUN, "zero", "crm", "rella"], out, baseline="zero", progress=False)
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def material(work: Path) -> Material:
    return gather(work, [GATED_RUN, "zero", "crm"], split="test", baseline="zero", seed=0)


def test_it_says_what_a_run_is(material: Material) -> None:
    first, zero, crm = (run.what for run in material.runs)
    expected = "CFLoRA + SPA, boosted from crm, 3 retrieved behaviours, 40% of them the most recent, mixture"
    assert first == f"{expected}, 10 shots"
    assert zero.endswith(" untrained, 3 recent behaviours")
    assert crm == "DIN, all training samples"


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects what a test asks for."""

    VOID = ("meta", "link", "br", "hr", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: dict[str, str] = dict.fromkeys(SECTIONS, "")
        self.section = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.section = dict(attrs).get("id") or self.section if tag == "section" else self.section
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.section and "section" in self.open:
            self.text[self.section] += data

    def values(self, name: str) -> list[str]:
        return [value for _, other, value in self.attributes if other == name]


def test_whole_accessible_and_alone(page: str) -> None:
    found = Page(page)
    assert found.open == []
    ids = found.values("id")
    assert len(set(ids)) == len(ids)
    assert set(SECTIONS) <= set(ids)
    assert all(href == "data:," or href.removeprefix("#") in ids for href in found.values("href"))
    assert {"script", "iframe", "object", "form", "img"}.isdisjoint(found.tags)
    assert not found.values("src")
    assert "http:" not in page
    assert "https:" not in page
    assert "url(" not in page
    assert "@import" not in page
    assert found.tags["table"] == found.tags["caption"] > 10
    named = [(tag, name) for tag, name, value in found.attributes if value.strip()]
    assert named.count(("svg", "aria-label")) + named.count(("svg", "aria-hidden")) == found.tags["svg"]
    assert page.count('class="says"') == len(SECTIONS)
    assert all(len(found.text[name]) > 60 for name in SECTIONS)


def test_nothing_from_the_data_is_markup(page: str) -> None:
    assert "<script" not in page
    assert "\0" not in page
    assert "&lt;script&gt;alert('x')&lt;/script&gt; &amp; \"quoted\" \N{REPLACEMENT CHARACTER}" in page
    assert GATED_RUN not in page
    assert html.escape(GATED_RUN, quote=False) in page


def test_the_same_folders_give_the_same_page(work: Path, page: str, tmp_path: Path) -> None:
    report(work, [GATED_RUN, "zero", "crm", "rella"], tmp_path / "a.html", baseline="zero", progress=False)
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == page


def test_metrics_are_those_of_the_shared_samples(work: Path, page: str, material: Material) -> None:
    data = Dataset.load(work / "data")
    chosen = data.choose("test", SAMPLES, 0)
    label = data.samples.label[chosen]
    columns = [work / GATED_RUN / "test", work / "zero" / "test", work / "crm"]
    found = [pq.read_table(folder / "predictions.parquet") for folder in columns]
    crm = found[2]["probability"].to_numpy()[chosen].astype(np.float64)
    probabilities = [*(table["probability"].to_numpy() for table in found[:2]), crm]
    text = Page(page).text["metrics"]
    for (run, scores), expected in zip(material.scored, probabilities, strict=True):
        assert np.array_equal(scores.sample, chosen)
        assert np.array_equal(scores.probability, expected)
        values = metrics.evaluate(label, expected, data.samples.user[chosen], seed=0)
        assert scores.metrics == values
        low, high = values["auc_interval"]
        assert f"{values['auc']:.3f} [{low:.3f}, {high:.3f}]" in text
        if run.name != "zero":
            pair = metrics.paired_bootstrap(label, expected, probabilities[1], data.samples.user[chosen])
            low, high = pair["interval"]
            assert f"{pair['difference']:+.3f} [{low:+.3f}, {high:+.3f}]" in text
    assert f"All are on the same {SAMPLES} samples" in text


def test_missing_parts_name_their_command(work: Path, page: str, tmp_path: Path) -> None:
    found = Page(page).text
    assert (
        "rella has no predictions on the test split: rellax evaluate rella --split test" in found["metrics"]
    )
    copy = shutil.copytree(work, tmp_path / "work", ignore=shutil.ignore_patterns("retrieved", "log.jsonl"))
    config = json.loads((copy / "rella" / "config.json").read_text())
    (copy / "rella" / "config.json").write_text(json.dumps(config | {"retrieved": None}))
    report(copy, ["rella", "crm"], copy / "report.html", split="valid", progress=False)
    found = Page((copy / "report.html").read_text(encoding="utf-8")).text
    assert "rellax evaluate rella --split valid" in found["metrics"]
    assert f"rellax retrieve --work {copy}" in found["retrieval"]
    assert "None of these runs has gates" in found["gates"]
    assert "--interaction full" in found["gates"]
    shutil.rmtree(copy / "crm")
    report(copy, [GATED_RUN], copy / "report.html", progress=False)
    found = Page((copy / "report.html").read_text(encoding="utf-8")).text
    assert "outputs.safetensors" not in found["gates"]  # the recorded folder is still there


@pytest.mark.parametrize("change", ["untrained", "anew", "no record"])
def test_predictions_of_another_model_are_not_a_runs(work: Path, tmp_path: Path, change: str) -> None:
    copy = shutil.copytree(work, tmp_path / "work")
    run = copy / GATED_RUN
    if change == "untrained":  # as `rellax evaluate --zero-shot` writes them
        shutil.rmtree(run / "test")
        shutil.copytree(copy / "zero" / "test", run / "test")
    elif change == "anew":
        with (run / "adapter" / "adapter.safetensors").open("ab") as file:
            file.write(b" ")
    else:
        (run / "test" / "config.json").unlink()
    found = gather(copy, [GATED_RUN, "zero", "crm"], split="test", baseline=None, seed=0)
    assert [run.name for run in found.unscored] == [GATED_RUN]
    assert [run.name for run, _ in found.scored] == ["zero", "crm"]


def test_runs_on_different_samples(work: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(work, tmp_path / "work")
    path = copy / "zero" / "test" / "predictions.parquet"
    table = pq.read_table(path)
    others = np.setdiff1d(Dataset.load(copy / "data").indices("test"), table["sample"].to_numpy())
    label = Dataset.load(copy / "data").samples.label[others]
    columns = {
        "sample": others.astype(np.int32),
        "label": label,
        "probability": np.linspace(0, 1, len(others)),
    }
    pq.write_table(pa.table(columns), path)
    report(copy, [GATED_RUN, "zero"], copy / "report.html", progress=False)
    text = Page((copy / "report.html").read_text(encoding="utf-8")).text["metrics"]
    assert "the runs scored different samples" in text
    assert "[+" not in text


def test_calibration_before_and_after(work: Path, tmp_path: Path, material: Material) -> None:
    copy = shutil.copytree(work, tmp_path / "work")
    (copy / GATED_RUN / "calibration.json").write_text(json.dumps({"temperature": 3.0}))
    report(copy, [GATED_RUN, "zero", "crm"], copy / "report.html", progress=False)
    text = Page((copy / "report.html").read_text(encoding="utf-8")).text["calibration"]
    scores = material.scored[0][1]
    logits = np.log(scores.probability) - np.log1p(-scores.probability)
    after = metrics.evaluate(scores.label, 1 / (1 + np.exp(-logits / 3)), bootstrap=0)["ece"]
    before = scores.metrics["ece"]
    assert f"ECE {before:.3f}; at its temperature of 3.00 (thin line) {after:.3f}" in text

    stacked = {"weight": 0.5, "crm_weight": 0.5, "bias": 0.0, "crm": "elsewhere/crm"}
    stacked["crm_sha256"] = sha256_file(copy / "crm" / "model.safetensors")
    (copy / GATED_RUN / "calibration.json").write_text(json.dumps(stacked))
    report(copy, [GATED_RUN, "zero", "crm"], copy / "report.html", progress=False)
    text = Page((copy / "report.html").read_text(encoding="utf-8")).text["calibration"]
    crm = material.scored[2][1].probability
    both = 1 / (1 + np.exp(-(logits + np.log(crm) - np.log1p(-crm)) / 2))
    after = metrics.evaluate(scores.label, both, bootstrap=0)["ece"]
    assert f"ECE {before:.3f}; stacked on crm (thin line) {after:.3f}" in text

    stacked["crm_sha256"] = "0"  # that of a CRM before it was trained anew
    (copy / GATED_RUN / "calibration.json").write_text(json.dumps(stacked))
    report(copy, [GATED_RUN, "zero", "crm"], copy / "report.html", progress=False)
    text = Page((copy / "report.html").read_text(encoding="utf-8")).text["calibration"]
    assert "stacked" not in text
    assert f"{GATED_RUN} is not calibrated" in text


def test_perfect_probabilities_and_small_samples() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random(200)
    drawn = [rng.random(200) < probability for _ in range(300)]
    seen = np.mean([metrics.evaluate(label.astype(int), probability, bootstrap=0)["ece"] for label in drawn])
    assert quality._ece_by_chance(probability, 1) == pytest.approx(seen, rel=0.1)
    low, high = quality._wilson(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_history_bins_hold_enough_samples() -> None:
    lengths = np.concatenate([np.full(30, 5), np.full(3, 12), np.full(40, 60), np.arange(100, 400)])
    edges = quality._history_edges(lengths)
    assert edges[0] == 5
    assert edges[-1] == 400
    counts = [((lengths >= low) & (lengths < high)).sum() for low, high in itertools.pairwise(edges)]
    assert min(counts) >= 20
    assert sum(counts) == len(lengths)
    assert quality._history_edges(np.full(9, 7)) == [7, 8]


def test_samples_shown_are_right_and_wrong(material: Material) -> None:
    run, scores = material.scored[2]
    right = dict(
        zip(scores.sample.tolist(), ((scores.probability >= 0.5) == scores.label).tolist(), strict=True)
    )
    assert set(right.values()) == {True, False}
    for seed in range(5):
        picked = retrieved.pick(dataclasses.replace(material, seed=seed), run, 4)
        assert len(set(picked)) == 4
        assert {right[sample] for sample in picked} == {True, False}
    assert retrieved.pick(material, None, 2) == retrieved.pick(material, None, 2)


def test_behaviours_side_by_side(material: Material) -> None:
    data = material.dataset
    sample = int(data.indices("test")[-1])
    found = retrieved.Retrieval(material)
    shown = found.show(sample)
    history = data.history(sample)
    rows = range(history.stop - 1, history.start - 1, -1)[: found.k]
    assert [line.title for line in shown.recent] == [data.titles[data.behaviour_items[row]] for row in rows]
    assert [line.age for line in shown.recent] == list(range(1, found.k + 1))
    assert [line.said for line in shown.recent] == [f"{data.behaviour_ratings[row]:g}" for row in rows]
    similar = (
        found.embeddings[data.behaviour_items[history].tolist()] @ found.embeddings[data.samples.item[sample]]
    )
    best = similar.sort(descending=True).values[: found.k]
    assert [line.similarity for line in shown.retrieved] == pytest.approx(best.tolist(), abs=1e-5)
    assert shown.said == f"{data.behaviour_ratings[history.stop]:g}"
    both = {line.title for line in shown.recent if line.on_both}
    assert both == {line.title for line in shown.retrieved if line.on_both}


def test_gates_are_those_of_the_model(work: Path, workspace: Workspace, material: Material) -> None:
    run = material.runs[0]
    samples = material.scored[0][1].sample
    found = gates_module.gates(material, run, samples)
    model = load_adapter(load_model(workspace.model, dtype="float32"), run.folder / "adapter")
    names = list(model.rellax.projections)
    assert [f"model.layers.{layer}.self_attn.{kind}" for layer, kind in found.projections] == names
    u = gates_module.crm.load_crm(work / "crm", material.dataset).instance_embeddings[samples]
    with torch.no_grad():
        gate = model.rellax.gate_bank(u)  # (M, n, r, r)
    change = (gate - torch.eye(2)).numpy()
    assert np.abs(change).max() > 1e-3
    np.testing.assert_allclose(found.mean, change.mean(1), atol=1e-6)
    squares = np.square(change).sum((2, 3)) / 2
    np.testing.assert_allclose(found.distance, np.sqrt(squares.mean(0)), rtol=1e-5)
    whole = found.shared**2 + found.personal**2
    np.testing.assert_allclose(whole, squares.mean(1), rtol=1e-4)
    spread = (change - change.mean(1, keepdims=True)).transpose(1, 0, 2, 3).reshape(len(samples), -1)
    np.testing.assert_allclose(found.components @ found.components.T, spread @ spread.T, atol=1e-6)
    assert found.explained.sum() == pytest.approx(1)


def test_variance_between_segments() -> None:
    rng = np.random.default_rng(0)
    code = rng.integers(0, 3, 300)
    noise = rng.normal(size=(300, 4))
    empty = np.zeros(0)

    def share(components: np.ndarray) -> tuple[float, float]:
        components = components - components.mean(0)
        found = gates_module.Gates([], empty, empty, empty, empty, components, empty)
        return gates_module.explained_by(found, gates_module.Segments("", ("a", "b", "c"), code), 0)

    told, chance = share(10 * np.eye(3)[code] @ rng.normal(size=(3, 4)) + noise)
    assert told > 0.8 > 0.1 > chance
    untold, chance = share(noise)
    assert untold < 2 * chance < 0.1
    assert share(np.zeros((300, 4))) == (0.0, 0.0)


def test_segments_of_values() -> None:
    many = np.array(list("aaaabbbbccccddddeeeefgh"))
    found = gates_module._by_value("letter", many)
    assert found.names == ("a", "b", "c", "d", "e", "all others")
    assert [found.names[code] for code in found.code[-4:]] == ["e", "all others", "all others", "all others"]
    quarters = gates_module._quarters("number", np.arange(1, 101))
    assert quarters.names == ("1 to 25", "26 to 50", "51 to 75", "76 to 100")
    assert gates_module._quarters("number", np.full(9, 3)).names == ("3 to 3",)


def test_axes_have_round_ticks() -> None:
    assert [label for _, label in Axis.between("", 0, 1).ticks] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert [label for _, label in Axis.between("", 3, 1234).ticks] == ["500", "1,000"]
    assert Axis.counting("", 0, 2).ticks == ((0, "0"), (1, "1"), (2, "2"))
    assert Axis.over("", [0.5, 0.5]).low < 0.5 < Axis.over("", [0.5, 0.5]).high
    assert Axis.over("", [float("nan")]).low < Axis.over("", [float("nan")]).high


def test_bad_input(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*arguments: str) -> str:
        assert cli.main(["report", *arguments, "--work", str(work), "--out", str(tmp_path / "x.html")]) == 2
        assert not list(tmp_path.glob("*.html"))
        return capsys.readouterr().err

    assert "expected a run of `rellax train`" in fails("data")
    assert "expected a run of `rellax train`" in fails("nowhere")
    assert "expected each once, got crm, crm" in fails("crm", "crm")
    assert "baseline: expected one of the runs crm, got 'rella'" in fails("crm", "--baseline", "rella")
    shutil.copytree(work / "zero", work / "other")
    path = work / "other" / "test" / "predictions.parquet"
    table = pq.read_table(path)
    wrong = pa.array(1 - table["label"].to_numpy(), pa.int8())
    pq.write_table(table.set_column(1, "label", wrong), path)
    assert "expected predictions of the samples of" in fails("other")
    path.write_bytes(path.read_bytes()[:50])
    assert "but it is damaged" in fails("other")


def test_command(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "zero", "--work", str(work)]) == 0
    assert capsys.readouterr().out == f"{work / 'report.html'}\n"
    assert (work / "report.html").read_bytes().startswith(b"<!doctype html>")


FRAME = """<!doctype html><title>frame</title><pre id="result">nothing</pre><script>
const results = {}, pages = PAGES
for (const width of [390, 1280]) {
  const frame = document.createElement("iframe")
  frame.width = width; frame.height = 800; frame.style.border = 0
  frame.onload = () => {
    const inside = frame.contentDocument, seen = element => element.getBoundingClientRect().height > 0
    results[width] = {
      overflow: inside.documentElement.scrollWidth - inside.documentElement.clientWidth,
      sections: [...inside.querySelectorAll("section")].filter(seen).map(section => section.id),
      unseen: [...inside.querySelectorAll("svg")].filter(svg => !svg.closest("details") && !seen(svg)).length,
      fetched: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
    }
    document.getElementById("result").textContent = JSON.stringify(results)
  }
  frame.srcdoc = pages
  document.body.append(frame)
}
</script>"""


def browse(page: str, folder: Path) -> tuple[dict[str, dict[str, object]], list[str]]:
    """What a browser makes of a page in a narrow and a wide frame, and what it writes to its console."""
    assert BROWSER is not None
    frame = folder / "frame.html"
    frame.write_text(FRAME.replace("PAGES", json.dumps(page).replace("</", "<\\/")), encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
    ]
    options += [
        f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr",
        "--virtual-time-budget=9000",
    ]
    done = subprocess.run(
        [BROWSER, *options, "--dump-dom", f"file://{frame}"],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    result = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert result is not None, done.stdout[:500] + done.stderr[-500:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(result[1])), console


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on this machine")
def test_in_a_browser(page: str, tmp_path: Path) -> None:
    found, console = browse(page, tmp_path)
    assert console == []
    for width in ("390", "1280"):
        assert found[width] == {"overflow": 0, "sections": list(SECTIONS), "unseen": 0, "fetched": []}


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on this machine")
def test_the_browser_would_see_what_is_wrong(page: str, tmp_path: Path) -> None:
    spoilt = '<div style="width:500px">x</div><img src="file:///nowhere.png"><script>throw 1</script></main>'
    found, console = browse(page.replace("</main>", spoilt), tmp_path)
    assert found["390"]["overflow"] > 0
    assert any("Content Security Policy" in line for line in console)
