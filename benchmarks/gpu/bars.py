"""The bars that this project has set itself on a GPU, as data, and what a run says of each.

They were set for an NVIDIA H200; on another device they are a comparison, no promise.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Sections = Mapping[str, Mapping[str, Any]]


class NotMeasuredError(Exception):
    """The reason why a bar has no figure."""


@dataclass(frozen=True)
class Source:
    """Where a figure is: in the record of a section whose name matches `record`.

    Attributes:
        key: of the record; with dots, of a dictionary in it.
        pick: the extreme over all such records; None where there is one.
    """

    section: str
    record: str
    key: str
    pick: Callable[[list[float]], float] | None = None

    def value(self, sections: Sections) -> float:
        section = sections.get(self.section)
        if section is None:
            raise NotMeasuredError(f"section {self.section} was not run")
        found = []
        for name, record in section["records"].items():
            value: Any = record if re.fullmatch(self.record, name) else None
            for part in self.key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if isinstance(value, (int, float)):
                found.append(float(value))
        if not found:
            state = f"{section['status']}, {section['reason']}" if section["reason"] else section["status"]
            raise NotMeasuredError(f"section {self.section} ({state}) has no {self.key} of {self.record}")
        return self.pick(found) if self.pick else found[0]

    def partial(self, sections: Sections) -> bool:
        """Whether there may have been more records to pick from."""
        return self.pick is not None and sections[self.section]["status"] != "done"


@dataclass(frozen=True)
class Bar:
    """What must hold: the figure, over another one where there is one, at most or at least the threshold."""

    title: str
    figure: Source
    at: str  # "<=" or ">="
    threshold: float
    over: Source | None = None
    unit: str = "x"

    def judge(self, sections: Sections) -> tuple[str, float | None]:
        """Met, partial where it holds of what there is, missed, or not measured and why; and the figure."""
        try:
            value = self.figure.value(sections)
            value /= self.over.value(sections) if self.over else 1.0
        except NotMeasuredError as reason:
            return f"not measured: {reason}", None
        holds = {"<=": operator.le, ">=": operator.ge}[self.at](value, self.threshold)
        partial = any(source.partial(sections) for source in (self.figure, self.over) if source)
        return ("missed" if not holds else "partial" if partial else "met"), value


HEADLINE = r"cflora {} T=8192 d=4096 r=16 B=8"
SHARED = r"cflora qkv {} T=8192 d=4096 r=16 B=8"
SOFT = r"soft_prompt {} B=16 L=1024 d=4096"
LOSS = r"bench_answer\.py::test_answer\[{}\]"
MEMORY = r"bench_answer\.py::test_answer_peak_memory\[{}\]"
STEP = r"bench_step\.py::test_step\[llama-7b-k30\]"
COPY = Source("machine", "copy", "bytes_per_s")

BARS = (
    Bar(
        "CFLoRA forward, overhead over the frozen layer (d = 4096, r = 16, T = 8192)",
        Source("sweep", HEADLINE.format("forward"), "overhead.rellax"),
        "<=",
        0.13,
        unit="%",
    ),
    Bar(
        "the same, forward + backward, A and B frozen",
        Source("sweep", HEADLINE.format("both"), "overhead.rellax"),
        "<=",
        0.15,
        unit="%",
    ),
    Bar(
        "the same forward overhead against the time its bytes must take",
        Source("sweep", HEADLINE.format("forward"), "over_floor"),
        "<=",
        1.3,
    ),
    Bar(
        "the same forward + backward overhead against the time its bytes must take",
        Source("sweep", HEADLINE.format("both"), "over_floor"),
        "<=",
        1.3,
    ),
    Bar(
        "CFLoRA on shared q/k/v, forward overhead",
        Source("sweep", SHARED.format("forward"), "overhead.rellax"),
        "<=",
        0.09,
        unit="%",
    ),
    Bar(
        "CFLoRA at every T, r and B of the sweep: the best peer's time over ours, at worst",
        Source("sweep", r"cflora (forward|both) .*", "best_peer_over_rellax", min),
        ">=",
        1.0,
    ),
    Bar(
        "CFLoRA, memory kept for the backward pass over 4 T r bytes, A and B frozen",
        Source("sweep", r"cflora both .*", "kept_over_tr", max),
        "<=",
        2.0,
    ),
    Bar(
        "soft_prompt forward, bytes that must move over the measured copy (B = 16, L = 1024, d = 4096)",
        Source("sweep", SOFT.format("forward"), "bytes_per_s"),
        ">=",
        0.85,
        COPY,
        "%",
    ),
    Bar(
        "the same, forward + backward",
        Source("sweep", SOFT.format("both"), "bytes_per_s"),
        ">=",
        0.85,
        COPY,
        "%",
    ),
    Bar(
        "answer_loss, peak extra memory against full logits (V = 128k, B = 16, L = 1024)",
        Source("benchmarks", MEMORY.format("rellax_vocab"), "peak_bytes_of_all"),
        "<=",
        0.01,
        Source("benchmarks", MEMORY.format("full_logits"), "peak_bytes_of_all"),
        "%",
    ),
    Bar(
        "answer_loss forward + backward, full logits' time over ours",
        Source("benchmarks", LOSS.format("full_logits"), "seconds_of_all"),
        ">=",
        500.0,
        Source("benchmarks", LOSS.format("rellax_vocab"), "seconds_of_all"),
    ),
    Bar(
        "stage-2 step of a 7B-shaped Llama, K = 30: the published-style step's time over ours",
        Source("step", STEP, "speedup"),
        ">=",
        3.0,
    ),
    Bar(
        "the same step, our peak memory over the published-style step's",
        Source("step", STEP, "memory"),
        "<=",
        0.5,
    ),
    Bar(
        "history_topk, ML-25M-like, every behaviour a target (bf16)",
        Source("sweep", r"history_topk .*", "seconds.rellax"),
        "<=",
        0.5,
        unit="s",
    ),
    Bar(
        "item_topk, 10⁶ x 512 in bf16, all queries, from a sample of them",
        Source("sweep", r"item_topk .*", "all_queries_s.rellax"),
        "<=",
        4.0,
        unit="s",
    ),
    Bar(
        "item_topk against torch's matmul + topk",
        Source("sweep", r"item_topk .*", "over_rellax.matmul_topk"),
        ">=",
        1.0,
    ),
    Bar(
        "item_topk against faiss on the GPU",
        Source("sweep", r"item_topk .*", "over_rellax.faiss_gpu"),
        ">=",
        1.0,
    ),
)
