"""The section on retrieval: what the prompts of a few samples show, beside the most recent behaviours."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from rellax.ctr.report.charts import series, swatch
from rellax.ctr.report.html import Child, node, table
from rellax.ctr.report.material import Material, Run
from rellax.ctr.report.retrieved import Behaviour, Retrieval, Shown, Summary, pick
from rellax.ctr.report.words import bold, code, note, percent, says
from rellax.errors import InputError

_SHOWN = 4


def examples(material: Material) -> list[Element]:
    """A few samples, some predicted right and some wrong."""
    try:
        retrieval = Retrieval(material)
    except InputError as error:
        commands = [code(f"rellax {name} --work {material.work}") for name in ("embed", "retrieve")]
        return [
            says(["There are no retrieved behaviours to look at."]),
            note(f"{error}: ", commands[0], " and ", commands[1], " make it."),
        ]
    judge = _judge(material)
    samples = pick(material, judge, _SHOWN)
    scores = None if judge is None else judge.scores
    of_split = material.dataset.indices(material.split)
    summary = retrieval.summary(of_split if scores is None else scores.sample, material.seed)
    how = "random samples" if judge is None else f"random samples that {judge.name} got right and wrong"
    cards = [_card(material, retrieval.show(sample), judge) for sample in samples]
    return [says(_summary(summary)), node("p", f"{len(cards)} {how}, seed {material.seed}:"), *cards]


def _judge(material: Material) -> Run | None:
    """The best language model, or the best run where there is none."""
    scored = [one for one in material.scored if one[0].kind == "train"] or material.scored
    return max(scored, key=lambda one: one[1].metrics["auc"] or 0.0)[0] if scored else None


def _summary(summary: Summary | None) -> list[Child]:
    if summary is None:
        return ["All histories are so short that retrieval takes all of them."]
    k = summary.k
    return [
        "The ",
        bold(f"{k} retrieved behaviours"),
        f" have a mean similarity of {summary.similarity_retrieved:.2f} to the target, the {k} most recent "
        f"ones {summary.similarity_recent:.2f}; {percent(summary.new)} of the retrieved are not among the "
        f"most recent, and on average each passes over {summary.age_retrieved:,.0f} later behaviours "
        f"({summary.samples:,} samples with more than {k} behaviours).",
    ]


def _card(material: Material, shown: Shown, judge: Run | None) -> Element:
    answer = "Yes" if shown.label == 1 else "No"
    chips = []
    for run, scores in material.scored:
        row = scores.sample.searchsorted(shown.sample)
        if row < len(scores.sample) and scores.sample[row] == shown.sample:
            chips.append(_chip(material, run, float(scores.probability[row]), shown.label))
    who = f"{shown.profile}; " if shown.profile else ""
    rated = material.dataset.meta["answers"] is None
    said = "rating" if rated else "answer"
    answered = f"rated {shown.said}" if rated else shown.said
    return node(
        "article",
        node("h3", shown.target),
        node(
            "p",
            f"{who}{shown.history:,} earlier behaviours. The answer was ",
            bold(answer),
            f" ({answered}).",
        ),
        node("ul", chips, class_="chips"),
        node(
            "div",
            _side("Most recent", said, shown.recent),
            _side("Retrieved: nearest to the target", said, shown.retrieved),
            class_="sides",
        ),
        class_="sample",
    )


def _chip(material: Material, run: Run, probability: float, label: int) -> Element:
    right = (probability >= 0.5) == (label == 1)
    verdict = node("span", "✓ right" if right else "✗ wrong", class_="right" if right else "wrong")
    return node("li", swatch(series(material.index(run))), f" {run.name} {probability:.2f} ", verdict)


def _side(caption: str, said: str, lines: list[Behaviour]) -> Element:
    rows: list[list[Child]] = []
    for line in lines:
        bar = node("i", class_="similarity", style=f"width:{100 * max(line.similarity, 0):.0f}%")
        similarity = node("span", f"{line.similarity:.2f}", bar, class_="num")
        title = node("span", line.title, node("small", " on both sides") if line.on_both else None)
        rows.append([title, line.said, f"{line.age:,}", similarity])
    return table(caption, ["title", said, "behaviours ago", "similarity"], rows)
