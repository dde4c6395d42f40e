"""What a stage-2 step of a 7B Llama keeps for its backward pass: rellax's, compiled too, and published.

Counted on a CPU, for models of one and of two layers: autograd's saved tensors, each storage once, without
parameters. What lives in between, such as gradients or copies of the logits, is not counted.

python benchmarks/saved.py > benchmarks/results/saved-cpu.md
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench_step import BATCH, LLAMA_7B, Setting, Steps, synthetic
from torch import Tensor

from rellax.ctr.batches import Example
from rellax.patch import compile_frozen

LAYERS, D, WIDE = (LLAMA_7B[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size"))
WIDTHS = (D, WIDE, D // LLAMA_7B["num_attention_heads"], LLAMA_7B["vocab_size"])
STEPS = ("rellax", "rellax, compiled", "published")
HEAD = """# What a stage-2 step keeps for its backward pass

`python benchmarks/saved.py`, torch {torch}, no GPU: a Llama of 7B's shape in bf16, K = 30, batch {batch},
A and B frozen; {packed} tokens packed by rellax, {padded} padded by the published step. Autograd's saved
tensors without parameters, each storage once, counted in models of one and of two layers. Gradients,
optimiser and what lives in between are not counted.
"""
Sizes = dict[str, float]
"""Bytes of a token, by dtype and last dimension."""


def saved(loss_of: Callable[[Sequence[Example]], Tensor], model: Any, examples: Sequence[Example]) -> Counter:
    """Bytes that the loss of these prompts keeps till its backward pass, by dtype and last dimension."""
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    found: dict[int, tuple[str, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            last = tensor.shape[-1] if tensor.dim() else 1
            name = f"{str(tensor.dtype).removeprefix('torch.')} x {last}" if last in WIDTHS else "other"
            found[storage.data_ptr()] = name, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(examples)
    assert loss.requires_grad, "the graph that keeps the tensors lives till here"
    sizes: Counter = Counter()
    for name, size in found.values():
        sizes[name] += size
    return sizes


def count(layers: int) -> tuple[list[Sizes], list[int]]:
    """What each of the steps keeps of a token, and the tokens of their batches."""
    gc.collect()
    torch.manual_seed(0)
    setting = Setting(30, 1, LLAMA_7B | {"num_hidden_layers": layers})
    given, examples = synthetic(setting, BATCH, torch.bfloat16, torch.device("cpu"))
    steps = Steps(*given)
    lengths = [len(example.input_ids) + 1 for example in examples]
    tokens = [sum(lengths), sum(lengths), BATCH * max(lengths)]  # packed, packed and padded
    sizes = [saved(steps.rellax_loss, steps.model, examples)]
    published = saved(steps.published_loss, steps.published_model, examples)
    compile_frozen(steps.model)
    steps.rellax_loss(examples)  # compiles
    sizes += [saved(steps.rellax_loss, steps.model, examples), published]
    per_token = [
        {name: n / count for name, n in found.items()} for found, count in zip(sizes, tokens, strict=True)
    ]
    return per_token, tokens


def main() -> None:
    (one, _), (two, tokens) = count(1), count(2)
    layer = [{name: b.get(name, 0) - a.get(name, 0) for name in a | b} for a, b in zip(one, two, strict=True)]
    in_layers = [LAYERS * sum(sizes.values()) * n for sizes, n in zip(layer, tokens, strict=True)]
    outside = [(sum(a.values()) - sum(b.values())) * n for a, b, n in zip(one, layer, tokens, strict=True)]
    in_all = [a + b for a, b in zip(in_layers, outside, strict=True)]
    weights = 2 * (LAYERS * (4 * D * D + 3 * D * WIDE) + 2 * LLAMA_7B["vocab_size"] * D)

    print(HEAD.format(torch=torch.__version__, batch=BATCH, packed=tokens[0], padded=tokens[-1]))
    print(_row("KiB of a token and layer, by dtype and last dimension", STEPS))
    print(_row("---", ["---"] * len(STEPS)))
    for name in sorted(set().union(*layer)):
        cells = [f"{sizes.get(name, 0) / 1024:.1f}" for sizes in layer]
        if set(cells) - {"0.0", "-0.0"}:
            print(_row(name, cells))
    print(_row("in all", [f"{sum(sizes.values()) / 1024:.1f}" for sizes in layer]))
    print("\n" + _row(f"GiB, {LAYERS} layers", [*STEPS, "rellax / published", "compiled / published"]))
    print(_row("---", ["---"] * 5))
    _line("layers", in_layers)
    _line("outside of the layers", outside)
    _line("all saved tensors", in_all)
    _line(f"beside weights in bf16, {weights / 2**30:.1f} GiB, which all have", [n + weights for n in in_all])


def _line(what: str, sizes: Sequence[float]) -> None:
    shares = [f"{size / sizes[-1]:.2f}" for size in sizes[:-1]]
    print(_row(what, [f"{size / 2**30:.2f}" for size in sizes] + shares))


def _row(what: str, cells: Sequence[str]) -> str:
    return f"| {what} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
