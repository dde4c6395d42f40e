"""Patched models against transformers models with the adapted weights written out, instance by instance."""

from __future__ import annotations

import copy
import itertools
import math
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import accelerate
import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from tiny_models import FAMILIES, LAYOUTS, NO, YES, Truth
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, GenerationMixin, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from rellax.errors import InputError
from rellax.kernels import _tiles
from rellax.kernels import cflora as kernels
from rellax.nn.cflora import CFLoRALinear
from rellax.ops import cflora as operators
from rellax.patch import (
    CFLoRAConfig,
    answer_logits,
    checkpoint,
    compile_frozen,
    engine,
    patch_model,
    unpatch_model,
)
from rellax.patch import forward as patched_forward
from rellax.patch.forward import ForwardContext, Handed

CHECKPOINTS = ("none", "non-reentrant", "reentrant")
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
WORDS = list(range(tiny.VOCAB))
FORCED = {  # after prompts of 9 tokens a placeholder is generated
    "prefix_allowed_tokens_fn": lambda _, ids: [tiny.PLACEHOLDERS[0]] if len(ids) == 9 else WORDS
}


def close(actual: Any, expected: Any) -> None:
    """Equal to rounding: even for fp64 weights transformers computes norms and rotations in fp32."""
    assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def pair(family: str = "llama", **options: Any) -> tuple[Any, Truth]:
    """A patched model, and the truth about it."""
    base = tiny.base_model(family)
    truth_base = copy.deepcopy(base)
    model = tiny.patched(base, **options)
    return model, Truth(truth_base, model)


def set_checkpointing(model: Any, kind: str, **options: Any) -> None:
    if kind != "none":
        old_name = model.gradient_checkpointing_enable  # which newer versions of transformers warn about
        enable = getattr(model, "activation_checkpointing_enable", old_name)
        enable({"use_reentrant": kind == "reentrant"}, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_logits_and_gradients_are_those_of_written_out_weights(family: str, layout: str) -> None:
    model, truth = pair(family)
    made = tiny.instances()
    out = model(**tiny.batch(made, layout))
    loss = truth.choice_loss(made)
    close(out.loss, loss)
    close(out.answer_logits, truth.choice_logits(made).detach())
    close(tiny.gradients(model, out.loss), tiny.true_gradients(model, loss))


@pytest.mark.parametrize("family", ["llama-tied", "gemma3"])
def test_soft_prompts_beside_words_that_are_tied_resized_and_trained(family: str) -> None:
    model, truth = pair(family)
    for resized in (model, truth.base):
        resized.resize_token_embeddings(
            tiny.VOCAB + 12, mean_resizing=False
        )  # both placeholders are words now
    words, true_words = (resized.get_input_embeddings().weight for resized in (model, truth.base))
    assert words is model.get_output_embeddings().weight
    with torch.no_grad():
        true_words.copy_(words)
    for weight in (words, true_words):
        weight.requires_grad_(True)
    made = tiny.instances()
    out, loss = model(**tiny.batch(made)), truth.choice_loss(made)
    close(out.loss, loss)
    close(
        *(torch.autograd.grad(value, weight)[0] for value, weight in ((out.loss, words), (loss, true_words)))
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prediction_without_labels(family: str, layout: str) -> None:
    model, truth = pair(family)
    model.eval()
    made = tiny.instances()
    arguments = tiny.batch(made, layout, answers=False)
    close(answer_logits(model, **arguments), truth.choice_logits(made).detach())
    full = model(**arguments).logits.detach()
    rows = full[0].split([n - 1 for n in tiny.LENGTHS]) if layout == "packed" else full
    for row, one in zip(rows, made, strict=True):
        real = row[-len(one.tokens) + 1 :] if layout != "right" else row[: len(one.tokens) - 1]
        close(real, truth.logits(one)[:-1].detach())


@pytest.mark.parametrize("interaction", ["full", "diagonal"])
@pytest.mark.parametrize("loss", ["choice", "vocab"])
def test_interactions_and_losses(interaction: str, loss: str) -> None:
    model, truth = pair(interaction=interaction, loss=loss)
    made = tiny.instances()
    arguments = tiny.batch(made)
    if loss == "vocab":  # a second label before the answer, and one on a first token, which nothing predicts
        arguments["labels"][1, 5], arguments["labels"][2, 0] = 33, 21
    out = model(**arguments)
    if loss == "choice":
        expected = truth.choice_loss(made)
    else:
        rows = [truth.logits(one)[-2] for one in made] + [truth.logits(made[1])[4]]
        expected = F.cross_entropy(torch.stack(rows), torch.tensor([*(one.tokens[-1] for one in made), 33]))
        first_label = [(0, -2), (1, 4), (2, -2)]
        choice = torch.stack([truth.logits(made[b])[t, [NO, YES]] for b, t in first_label]).detach()
        close(out.answer_logits, choice)
    close(out.loss, expected)
    close(tiny.gradients(model, out.loss), tiny.true_gradients(model, expected))


@pytest.mark.parametrize("loss", ["choice", "vocab"])
@pytest.mark.parametrize("family", ["llama", "gemma3"], ids=["plain", "soft-capped"])
def test_a_head_with_a_bias(family: str, loss: str) -> None:
    base = tiny.base_model(family)
    base.lm_head = torch.nn.Linear(tiny.HIDDEN, tiny.VOCAB, dtype=base.dtype)
    truth_base = copy.deepcopy(base)
    model = tiny.patched(base, loss=loss)
    truth = tiny.Truth(truth_base, model)
    made = tiny.instances()
    out = model(**tiny.batch(made))
    rows, answers = torch.stack([truth.logits(one)[-2] for one in made]), [one.tokens[-1] for one in made]
    expected = truth.choice_loss(made) if loss == "choice" else F.cross_entropy(rows, torch.stack(answers))
    close(out.loss, expected)
    close(out.answer_logits, rows[:, [NO, YES]].detach())
    close(tiny.gradients(model, out.loss), tiny.true_gradients(model, expected))


class _Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that an operator returns, in forward and backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **kwargs or {})
        self.seen |= {tuple(x.shape) for x in tree_leaves(made) if isinstance(x, torch.Tensor)}
        return made


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", ["choice", "vocab"])
def test_logits_of_all_tokens_never_exist(loss: str, layout: str) -> None:
    model, _ = pair(loss=loss)
    made = tiny.instances()
    with _Shapes() as training:
        model(**tiny.batch(made, layout)).loss.backward()
    with _Shapes() as evaluation:
        answer_logits(model, **tiny.batch(made, layout, answers=False))
    with _Shapes() as full:
        model(**tiny.batch(made, layout, answers=False))
    rows = {"training": training, "evaluation": evaluation, "full": full}
    most = {
        name: max((math.prod(s[:-1]) for s in shapes.seen if s[-1:] == (tiny.VOCAB,)), default=0)
        for name, shapes in rows.items()
    }
    assert most["training"] <= len(made)
    assert most["evaluation"] == 0
    assert most["full"] >= sum(tiny.LENGTHS) - len(made)


def test_num_items_in_batch_divides_the_sum() -> None:
    model, truth = pair()
    made = tiny.instances()
    for given in (7, torch.tensor(7)):
        loss = model(**tiny.batch(made), num_items_in_batch=given).loss
        close(loss, truth.choice_loss(made) * len(made) / 7)


@pytest.mark.parametrize("base", [{}, {"base_logit": torch.zeros(3)}], ids=["plain", "base_logit"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_choice_is_one_item_of_a_batch_however_many_labels_it_has(
    layout: str, base: dict[str, Tensor]
) -> None:
    """The answer and the end after it are labelled, and Trainer counts both."""
    model, truth = pair()
    made = tiny.instances()
    ended = [tiny.Instance(F.pad(one.tokens, (0, 1), value=2), one.items, one.embed) for one in made]
    arguments = tiny.batch(ended, layout) | base
    labels, ids = arguments["labels"].view(-1), arguments["input_ids"].view(-1)
    answers = (labels != -100).nonzero() - 1
    labels[answers] = ids[answers]
    assert int((labels != -100).sum()) == 6
    close(model(**arguments, num_items_in_batch=torch.tensor(6)).loss, truth.choice_loss(made))
    close(model(**arguments, num_items_in_batch=12).loss, truth.choice_loss(made) / 2)


def test_without_instance_embed_it_is_plain_lora() -> None:
    model, truth = pair()
    made = tiny.instances()
    arguments = tiny.batch(made) | {"instance_embed": None}
    close(model(**arguments).loss, truth.choice_loss(made, gated=False))


def test_patching_alone_changes_no_output() -> None:
    base = tiny.base_model()
    ids = tiny.batch(tiny.instances(placeholders=False))["input_ids"]
    before = base(ids).logits
    patch_model(base, tiny.config(gate_init="identity"))
    assert torch.equal(base(ids, instance_embed=torch.randn(3, tiny.COND)).logits, before)


# ---- forward and backward in other orders


@pytest.mark.parametrize("layout", ["left", "packed"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_checkpointing_changes_no_gradient(family: str, kind: str, layout: str) -> None:
    model, truth = pair(family)
    set_checkpointing(model, kind)
    made = tiny.instances()
    out = model(**tiny.batch(made, layout))
    expected = tiny.true_gradients(model, truth.choice_loss(made))
    close(tiny.gradients(model, out.loss), expected)


@pytest.mark.parametrize("kind", CHECKPOINTS[1:])
def test_checkpointing_repeats_dropout(kind: str) -> None:
    model, _ = pair(dropout=0.4)
    arguments = tiny.batch(tiny.instances())
    torch.manual_seed(9)
    expected = tiny.gradients(model, model(**arguments).loss)
    set_checkpointing(model, kind)
    torch.manual_seed(9)
    close(tiny.gradients(model, model(**arguments).loss), expected)


@pytest.mark.parametrize(
    ("lora", "gates", "soft_prompt"),
    [part for part in itertools.product([True, False], repeat=3) if any(part)],
)
def test_reentrant_checkpointing_with_frozen_parts(lora: bool, gates: bool, soft_prompt: bool) -> None:
    model, truth = pair()
    model.rellax.set_trainable(lora=lora, gates=gates, soft_prompt=soft_prompt)
    set_checkpointing(model, "reentrant")
    made = tiny.instances()
    loss = model(**tiny.batch(made)).loss
    expected = tiny.true_gradients(model, truth.choice_loss(made))
    close(tiny.gradients(model, loss), expected)


def test_reentrant_checkpointing_of_every_second_layer() -> None:
    model, truth = pair()
    set_checkpointing(model, "reentrant", every_n_layers=2)
    made = tiny.instances()
    expected = tiny.true_gradients(model, truth.choice_loss(made))
    close(tiny.gradients(model, model(**tiny.batch(made)).loss), expected)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_two_forwards_before_one_backward(kind: str) -> None:
    model, truth = pair()
    set_checkpointing(model, kind)
    first, second = tiny.instances(seed=3), tiny.instances(seed=4)
    loss = model(**tiny.batch(first)).loss + 2 * model(**tiny.batch(second, "packed")).loss
    expected = truth.choice_loss(first) + 2 * truth.choice_loss(second)
    close(tiny.gradients(model, loss), tiny.true_gradients(model, expected))


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_other_users_in_flight(kind: str) -> None:
    """A backward pass that recomputes its layers after the model has seen other users, and other shapes."""
    model, truth = pair()
    set_checkpointing(model, kind)
    first, second = tiny.instances(seed=3), tiny.instances(seed=4)
    loss = model(**tiny.batch(first)).loss
    other = model(**tiny.batch(second, "packed")).loss
    answer_logits(model, **tiny.batch(second[:1], answers=False))
    close(tiny.gradients(model, loss), tiny.true_gradients(model, truth.choice_loss(first)))
    close(tiny.gradients(model, other), tiny.true_gradients(model, truth.choice_loss(second)))


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_second_backward_through_one_forward(kind: str) -> None:
    model, _ = pair()
    set_checkpointing(model, kind)
    loss = model(**tiny.batch(tiny.instances())).loss
    loss.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in tiny.trainable(model).items()}
    close(tiny.gradients(model, loss), first)


def test_a_failed_forward_leaves_no_gate_behind() -> None:
    """The decoder alone, without the patched model around it, is plain LoRA."""
    model, _ = pair(soft_prompt=False)
    arguments = tiny.batch(tiny.instances(placeholders=False))
    ids = arguments["input_ids"]
    expected = model(ids).logits
    fail = model.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**arguments)
    fail.remove()
    assert torch.equal(model.lm_head(model.model(ids).last_hidden_state), expected)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_threads_have_gates_of_their_own(kind: str) -> None:
    """Before each adapted layer a thread waits until the other one has come as far."""
    model, _ = pair(target_modules=(*ATTENTION_INPUTS, "down_proj"))
    set_checkpointing(model, kind)

    def step(seed: int) -> tuple[Tensor, Tensor]:
        arguments = tiny.batch(tiny.instances(seed))
        embed = arguments["instance_embed"].requires_grad_()
        loss = model(**arguments).loss
        loss.backward()
        assert embed.grad is not None
        return loss.detach(), embed.grad

    alone = [step(seed) for seed in (3, 4)]
    both = threading.Barrier(2, timeout=300)

    def wait(*_: Any) -> None:
        both.wait()

    for projection in model.rellax.projections.values():
        projection.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as threads:
        close(list(threads.map(step, (3, 4))), alone)


@pytest.mark.parametrize("kind", CHECKPOINTS[1:])
def test_layers_are_recomputed_in_another_thread(kind: str) -> None:
    """As in autograd's own for a GPU."""
    model, truth = pair(target_modules=(*ATTENTION_INPUTS, "down_proj"))
    set_checkpointing(model, kind)
    made = tiny.instances()
    loss = model(**tiny.batch(made)).loss
    with ThreadPoolExecutor(1) as other:
        found = other.submit(tiny.gradients, model, loss).result()
    close(found, tiny.true_gradients(model, truth.choice_loss(made)))


def test_in_eval_mode_nothing_is_checkpointed() -> None:
    model, truth = pair()
    set_checkpointing(model, "reentrant")
    model.eval()
    made = tiny.instances()
    expected = tiny.true_gradients(model, truth.choice_loss(made))
    close(tiny.true_gradients(model, model(**tiny.batch(made)).loss), expected)


def test_lost_gate_gradients_are_an_error() -> None:
    embeds = torch.randn(2, 4, 8, requires_grad=True)
    gates = torch.randn(3, 2, 2, 2, requires_grad=True)
    entered, leaves = checkpoint.enter(embeds, gates)
    with pytest.raises(RuntimeError, match="no layer gave its gates a gradient"):
        entered.sum().backward()
    entered, leaves = checkpoint.enter(embeds, gates)
    (entered.sum() + leaves[1].sum()).backward()
    assert torch.equal(gates.grad, torch.tensor([0.0, 1, 0]).view(3, 1, 1, 1).expand_as(gates))


def test_gates_feel_the_loss_at_the_identity() -> None:
    """The identity's W2 and b2 get gradients while B is not zero, and none at all while it is."""
    model, _ = pair(gate_init="identity")
    bank, arguments = model.rellax.gate_bank, tiny.batch(tiny.instances())
    bank.reset_parameters()
    tiny.gradients(model, model(**arguments).loss)
    assert (bank.w2.grad.abs().amax((1, 2)) > 0).all()
    assert (bank.b2.grad.abs().amax(1) > 0).all()
    for projection in model.rellax.projections.values():
        projection.lora_b.data.zero_()
    tiny.gradients(model, model(**arguments).loss)
    assert not bank.w2.grad.any()


# ---- generation, precision, compilation, copies


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_equals_generation_without(family: str, beams: int) -> None:
    """The first token is made to be a placeholder, which is then a word."""
    model, truth = pair(family)
    model.eval()
    made = tiny.instances()
    arguments = tiny.batch(made, "left", answers=False)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None} | FORCED
    cached = model.generate(**arguments, **options)
    assert torch.equal(cached, model.generate(**arguments, **options, use_cache=False))
    if beams == 1:  # each token is the truth's choice after the ones before
        for row, one in zip(cached, made, strict=True):
            prompt = torch.cat([one.tokens[:-1], row[-6:-5]])
            assert prompt[-1] == tiny.PLACEHOLDERS[0]
            for token in row[-5:]:
                logits = truth.logits(tiny.Instance(prompt, one.items, one.embed))[-1]
                assert int(logits.argmax()) == int(token)
                prompt = torch.cat([prompt, token[None]])


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 1},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static", "disable_compile": True},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_ways_to_generate(options: dict[str, Any]) -> None:
    model, _ = pair()
    model.eval()
    arguments = tiny.batch(tiny.instances(), "left", answers=False)
    arguments["input_ids"][arguments["input_ids"] == tiny.PLACEHOLDERS[1]] = tiny.PLACEHOLDERS[0]
    if (
        "prompt_lookup_num_tokens" in options
    ):  # for one row, and transformers looks its words up in the logits
        arguments = {name: value[1:2] for name, value in arguments.items()}
    one = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None} | FORCED
    beams = {name: options[name] for name in options if name == "num_beams"}
    expected = model.generate(**arguments, **one, **beams, use_cache=False)
    found = model.generate(**arguments, **one, **options)
    assert torch.equal(found[:: len(found) // len(expected)], expected)


@pytest.mark.parametrize("start", [1, 4, 8])
def test_generation_goes_on_from_a_cache(start: int) -> None:
    """The prompt is given as a whole, in chunks, or as what follows the cached tokens."""
    model, _ = pair()
    model.eval()
    arguments = {
        name: value[1:2] for name, value in tiny.batch(tiny.instances(), "left", answers=False).items()
    }
    ids, items = arguments["input_ids"], arguments["item_ids"]
    before = int(model.rellax.soft_prompt.is_placeholder(ids[:, :start]).sum())
    one = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**arguments, **one)

    def cached() -> dict[str, Any]:
        cache = DynamicCache(config=model.config)
        beginning = {"input_ids": ids[:, :start], "item_ids": items[:, :before]}
        model(**arguments | beginning | {"attention_mask": None}, use_cache=True, past_key_values=cache)
        return {patched_forward.CACHE: cache}

    assert torch.equal(model.generate(**arguments, **one, **cached()), expected)
    rest = {"input_ids": ids[:, start:], "item_ids": items[:, before:]}
    assert torch.equal(model.generate(**arguments | rest, **one, **cached()), expected[:, start:])
    if patched_forward.CACHE != "cache":
        return  # chunks begin with the cached tokens then
    chunked = model.generate(**arguments, **one, **cached(), prefill_chunk_size=2)
    assert torch.equal(chunked, expected)
    if start == 4:  # which of the items follow is not known then
        with pytest.raises(InputError, match="prefill_chunk_size: expected None beside a cache"):
            model.generate(**arguments | rest, **one, **cached(), prefill_chunk_size=2)


def test_answers_after_cached_tokens() -> None:
    """The mask is that of the cached tokens as well; the others end at different places."""
    model, truth = pair(soft_prompt=False)
    model.eval()
    made = tiny.instances(placeholders=False)
    arguments = tiny.batch(made, "right", answers=False)
    ids, mask = arguments.pop("input_ids"), arguments.pop("attention_mask")
    cache = DynamicCache(config=model.config)
    model(ids[:, :3], **arguments, past_key_values=cache, use_cache=True)
    logits = answer_logits(
        model, input_ids=ids[:, 3:], attention_mask=mask, **arguments, past_key_values=cache
    )
    close(logits, truth.choice_logits(made).detach())


def test_a_generated_placeholder_after_embeddings() -> None:
    model, _ = pair()
    model.eval()
    arguments = tiny.batch(tiny.instances(), "left", answers=False)
    one = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    ids, items = arguments.pop("input_ids"), arguments.pop("item_ids")
    embeds = model.rellax.soft_prompt(ids, items, model.get_input_embeddings().weight)
    forced = {"prefix_allowed_tokens_fn": lambda _, ids: WORDS[60:] if len(ids) == 0 else WORDS}
    found = model.generate(**arguments, **one, **forced, inputs_embeds=embeds)
    assert torch.equal(
        found, model.generate(ids, item_ids=items, **arguments, **one, **FORCED)[:, ids.shape[1] :]
    )


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (lambda items: None, "item_ids: expected the items of the placeholders in input_ids, got None"),
        (lambda items: items[:, :1], "item_ids: expected 2 ids in row 0, .*, got 1"),
        (lambda items: items.tolist(), "item_ids: expected a tensor, got list"),
    ],
    ids=["none", "few", "list"],
)
def test_a_prompt_to_generate_from_has_all_its_items(items: Any, message: str) -> None:
    model, _ = pair()
    arguments = tiny.batch(tiny.instances(), "left", answers=False)
    with pytest.raises(InputError, match=message):
        model.generate(**arguments | {"item_ids": items(arguments["item_ids"])}, max_new_tokens=1)


def test_generate_is_transformers_own() -> None:
    base = tiny.base_model().eval()
    prompt = torch.randint(8, tiny.VOCAB - 1, (2, 6))
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    expected = base.generate(prompt, **options)
    model = patch_model(base, tiny.config(), soft_prompt=tiny.soft_prompt_config())
    assert type(model).generate is GenerationMixin.generate
    generated = model.generate(prompt, **options)
    assert torch.equal(generated.sequences, expected.sequences)
    close(generated.logits, expected.logits)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_half_precision_is_as_exact_as_written_out_weights(weights: torch.dtype) -> None:
    """fp32 weights under autocast, and bf16 weights with fp32 adapters; the yardstick is the eager error."""
    base = tiny.base_model(dtype=weights)
    exact_base = copy.deepcopy(base).double()
    model, exact = tiny.patched(copy.deepcopy(base)), tiny.patched(copy.deepcopy(exact_base))
    exact.load_state_dict(model.state_dict())
    made = tiny.instances()
    true_loss = Truth(exact_base, exact).choice_loss(made)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        loss = model(**tiny.batch(made)).loss
        eager_loss = Truth(base, model).choice_loss(made)
    assert loss.dtype == torch.float32
    ours, eager = tiny.gradients(model, loss), tiny.true_gradients(model, eager_loss)
    true = tiny.true_gradients(exact, true_loss)
    assert {gradient.dtype for gradient in ours.values()} == {torch.float32}
    error, eager_error = (sum((got[n] - true[n]).norm() ** 2 for n in true) ** 0.5 for got in (ours, eager))
    assert error <= 2 * eager_error
    assert abs(loss - true_loss) <= 2 * abs(eager_loss - true_loss) + 1e-2


@pytest.mark.parametrize("layout", ["right", "packed"])
def test_compiled_it_is_one_graph_with_the_same_gradients(layout: str) -> None:
    model, truth = pair()
    made = tiny.instances()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(**tiny.batch(made, layout)).loss
    close(tiny.gradients(model, loss), tiny.true_gradients(model, truth.choice_loss(made)))
    model.eval()
    model.rellax.soft_prompt.cache_table()
    with torch.no_grad():
        logits = compiled(**tiny.batch(made, layout, answers=False), answer_only=True).answer_logits
    close(logits, truth.choice_logits(made).detach())


@pytest.mark.parametrize("kind", CHECKPOINTS[1:])
def test_compiled_with_checkpoints(kind: str) -> None:
    model, truth = pair()
    set_checkpointing(model, kind)
    made = tiny.instances()
    loss = torch.compile(model, backend="aot_eager")(**tiny.batch(made)).loss
    close(tiny.gradients(model, loss), tiny.true_gradients(model, truth.choice_loss(made)))


@pytest.mark.parametrize("layout", ["right", "packed"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_with_norms_and_mlps_compiled(family: str, layout: str) -> None:
    model, truth = pair(family, target_modules=("q_proj", "v_proj"))
    assert compile_frozen(model, backend="aot_eager") is model
    for lengths in (slice(None), slice(1, None)):  # one piece of code for batches of any size
        made = tiny.instances()[lengths]
        loss = model(**tiny.batch(made, layout)).loss
        close(tiny.gradients(model, loss), tiny.true_gradients(model, truth.choice_loss(made)))
    compiled = {name for name, module in model.named_modules() if module._compiled_call_impl is not None}
    first = {name.removeprefix("model.layers.0.") for name in compiled if name.startswith("model.layers.0.")}
    expected = {"input_layernorm", "post_attention_layernorm", "mlp"}
    expected |= {"qwen3": {"self_attn.q_norm", "self_attn.k_norm"}}.get(family, set())
    expected |= {"gemma2": {"pre_feedforward_layernorm", "post_feedforward_layernorm"}}.get(family, set())
    assert first == expected
    assert "model.norm" in compiled
    unpatch_model(model)
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_what_is_adapted_is_not_compiled() -> None:
    model, truth = pair(target_modules=("q_proj", "up_proj"))
    compile_frozen(model, backend="aot_eager")
    assert not any(type(part).__name__.endswith("MLP") for part in model.rellax.compiled)
    made = tiny.instances()
    loss = model(**tiny.batch(made)).loss
    close(tiny.gradients(model, loss), tiny.true_gradients(model, truth.choice_loss(made)))
    with pytest.raises(InputError, match="model: expected a patched model, got an unpatched Llama"):
        compile_frozen(unpatch_model(model))


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_deepcopy_works_on_its_own(kind: str) -> None:
    model, truth = pair()
    set_checkpointing(model, kind)
    made = tiny.instances()
    loss = model(**tiny.batch(made)).loss  # a copy in the middle of a step, and after one
    copy.deepcopy(model)
    expected = tiny.gradients(model, loss)
    twin = copy.deepcopy(model)
    tiny.randomise(twin, seed=8)
    close(tiny.gradients(model, model(**tiny.batch(made)).loss), expected)
    twin_truth = Truth(truth.base, twin)
    loss = twin_truth.choice_loss(made)
    close(tiny.gradients(twin, twin(**tiny.batch(made)).loss), tiny.true_gradients(twin, loss))
    del model
    unpatch_model(twin)
    ids = tiny.batch(tiny.instances(placeholders=False))["input_ids"]
    assert torch.equal(twin.eval()(ids).logits, truth.base.eval()(ids).logits)


# ---- patching and unpatching


def snapshot(model: Any) -> dict[str, Any]:
    """Everything unpatching has to restore, short of the tensors' values."""
    return {
        "classes": [type(module) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "keys": list(model.state_dict()),
        "storage": [tensor.data_ptr() for tensor in model.state_dict().values()],
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "modules": [name for name, _ in model.named_modules()],
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatching_gives_the_original_back(family: str) -> None:
    model = tiny.base_model(family)
    model.get_input_embeddings().weight.requires_grad_(False)
    ids = tiny.batch(tiny.instances(placeholders=False))["input_ids"]
    before, outputs = snapshot(model), model(ids).logits
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tiny.patched(model)
    tiny.gradients(model, model(**tiny.batch(tiny.instances())).loss)
    assert unpatch_model(model) is model
    assert snapshot(model) == before
    assert torch.equal(model(ids).logits, outputs)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, values[name])
    assert patch_model(model) is model  # and it can be patched again


@pytest.mark.parametrize("place", ["add_lora", "_put_in_front", "_report"])
def test_patching_that_is_interrupted_leaves_the_model_as_it_was(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.base_model()
    model.get_input_embeddings().weight.requires_grad_(False)
    before, calls = snapshot(model), itertools.count()
    owner: Any = CFLoRALinear if place == "add_lora" else engine
    original = getattr(owner, place)

    def interrupted(*args: Any) -> Any:
        if place == "_report" or next(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as context:
        context.setattr(owner, place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            patch_model(model, tiny.config(), soft_prompt=tiny.soft_prompt_config())
    assert snapshot(model) == before
    assert patch_model(model, tiny.config()) is model


def test_layers_that_share_their_input_may_be_offloaded_after_patching(tmp_path: Path) -> None:
    """accelerate loads a layer's weights when its turn comes, not when that of the first sharing one does."""
    model = tiny.patched(tiny.base_model()).eval()
    arguments = tiny.batch(tiny.instances())
    expected = model(**arguments).answer_logits
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head", "rellax")
    places = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    assert torch.equal(model(**arguments).answer_logits, expected)


def test_a_model_without_memory_gives_shapes() -> None:
    model = tiny.patched(tiny.base_model()).to("meta")
    arguments = {name: value.to("meta") for name, value in tiny.batch(tiny.instances()).items()}
    del arguments["attention_mask"]  # transformers reads it, and positions where there is no cache
    assert model(**arguments, use_cache=True).answer_logits.shape == (3, 2)
    with pytest.raises(InputError, match=r"^instance_embed: expected shape .* on meta, got .* on cpu"):
        model(**arguments | {"instance_embed": tiny.batch(tiny.instances())["instance_embed"]})


def test_nothing_but_the_instance_is_touched() -> None:
    forwards = LlamaForCausalLM.forward, LlamaAttention.forward, torch.nn.Linear.forward
    other = tiny.base_model()
    ids = tiny.batch(tiny.instances(placeholders=False))["input_ids"]
    before = other(ids).logits
    model, _ = pair()
    assert (LlamaForCausalLM.forward, LlamaAttention.forward, torch.nn.Linear.forward) == forwards
    assert torch.equal(other(ids).logits, before)
    assert isinstance(model, LlamaForCausalLM)
    assert (type(model).__name__, type(model).__module__) == (
        LlamaForCausalLM.__name__,
        LlamaForCausalLM.__module__,
    )


def test_parameter_names_and_what_is_trainable() -> None:
    names = set(dict(tiny.base_model().named_parameters()))
    model, _ = pair()
    added = set(dict(model.named_parameters())) - names
    assert names < set(dict(model.named_parameters()))
    lora = {f"{name}.lora_{ab}" for name in model.rellax.report.patched for ab in "ab"}
    assert (
        added == set(tiny.trainable(model)) == lora | {name for name in added if name.startswith("rellax.")}
    )
    model.rellax.set_trainable(lora=False)
    assert set(tiny.trainable(model)) == added - lora
    model.rellax.set_trainable(lora=True, gates=False, soft_prompt=False)
    assert set(tiny.trainable(model)) == lora
    model.rellax.set_trainable(gates=True)
    assert set(tiny.trainable(model)) == lora | {name for name in added if "gate_bank" in name}


def test_report() -> None:
    model, _ = pair()
    report = model.rellax.report
    assert report.patched[:3] == tuple(
        f"model.layers.0.{path}" for path in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    )
    assert len(report.patched) == 6
    assert report.skipped["model.layers.1.mlp.up_proj"] == "not in target_modules"
    counted = report.lora_parameters, report.gate_parameters, report.soft_prompt_parameters
    assert sum(counted) == sum(p.numel() for p in tiny.trainable(model).values())
    assert sum(counted) + report.base_parameters == sum(p.numel() for p in model.parameters())
    assert "skipped 2 x model.layers.*.mlp.up_proj: not in target_modules" in str(report)


class Calls(TorchDispatchMode):
    """Counts the calls of one operator."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.count = name, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += op.name() == self.name
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_that_read_one_tensor_run_as_one(layout: str) -> None:
    """Their outputs and gradients are those of layers on their own."""
    targets = (*ATTENTION_INPUTS, "gate_proj", "up_proj", "o_proj")
    model, _ = pair(target_modules=targets)
    assert model.rellax.report.shared_inputs[:2] == (
        tuple(f"model.layers.0.self_attn.{name}" for name in ATTENTION_INPUTS),
        ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
    )
    assert "sharing 2 x model.layers.*.self_attn.q_proj and k_proj, v_proj" in str(model.rellax.report)
    batch = tiny.batch(tiny.instances(), layout)
    results = []
    for expected in (3, 6):
        with Calls("rellax::cflora_linear") as calls:
            loss = model(**batch).loss
        assert calls.count == expected * len(model.model.layers)
        results.append((loss, tiny.gradients(model, loss)))
        for projection in model.rellax.projections.values():
            assert projection.in_flight.ready is None
            projection.sharing = ()
    assert_close(*results)


class OnGPU(Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


class GPUContext(ForwardContext):
    """What a forward pass hands to its layers on a GPU, here on a CPU for Triton's interpreter."""

    def __init__(self, gates: Any, cu_seqlens: Any, tokens: int) -> None:
        super().__init__(gates, cu_seqlens.as_subclass(OnGPU), tokens)
        self.cu_seqlens, self.tiles = cu_seqlens, self.tiles.as_subclass(Tensor)


@pytest.mark.parametrize("kind", ["none", "non-reentrant"])
def test_all_layers_and_both_passes_share_one_table_of_tiles(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.patched(tiny.base_model(dtype=torch.float32), target_modules=("q_proj", "v_proj"))
    set_checkpointing(model, kind)
    batch = tiny.batch(tiny.instances(), "packed")
    expected = model(**batch).loss
    gradients = tiny.gradients(model, expected)
    monkeypatch.setenv("RELLAX_BACKEND", "triton")
    monkeypatch.setattr(patched_forward, "ForwardContext", GPUContext)
    made = []
    for module in (operators, kernels):
        monkeypatch.setattr(module, "tile_table", lambda *args: made.append(args) or _tiles.tile_table(*args))
    loss = model(**batch).loss
    assert len(made) == 1
    close((loss, tiny.gradients(model, loss)), (expected, gradients))
    assert len(made) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_play_no_part_in_a_prediction(layout: str) -> None:
    """It is at the last token, whatever labels the batch has."""
    model, _ = pair()
    arguments = tiny.batch(tiny.instances(), layout)
    found = answer_logits(model, **arguments)
    del arguments["labels"]
    assert torch.equal(found, answer_logits(model, **arguments))


def test_a_layer_in_another_mode_is_not_computed_with_the_others() -> None:
    model = tiny.patched(tiny.base_model(), dropout=0.5)
    layer, seen = model.model.layers[0].self_attn.v_proj.eval(), []
    layer.register_forward_hook(lambda _, arguments, y: seen.append((arguments[0], y)))
    arguments = tiny.batch(tiny.instances(placeholders=False))
    del arguments["instance_embed"]
    model(**arguments)
    ((x, y),) = seen
    close(y, x @ (layer.weight + layer.scale * layer.lora_b @ layer.lora_a).t())


def test_a_shared_output_is_for_the_tensor_it_was_computed_from() -> None:
    model, _ = pair(target_modules=ATTENTION_INPUTS)
    q, k, v = (model.rellax.projections[f"model.layers.0.self_attn.{name}"] for name in ATTENTION_INPUTS)
    x, other = torch.randn(2, 1, 3, q.in_features, dtype=q.weight.dtype)
    alone = k(other)
    expected = v(x)
    assert q.in_flight.ready is None  # no attention block handed it anything
    for layer in (q, k, v):
        layer.receive(Handed())
    q(x)
    close(k(other), alone)
    close(v(x), expected)


def _gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20))


def _namesake() -> Any:
    """Of somebody else's class: the models of a hub's remote code are called as those of transformers."""
    model = tiny.base_model()
    model.__class__ = type("LlamaForCausalLM", (type(model),), {})
    return model


def _strange_linear() -> Any:
    model = tiny.base_model()
    model.model.layers[1].self_attn.q_proj.__class__ = type("Linear8bitLt", (torch.nn.Linear,), {})
    return model


def _hooked() -> Any:
    model = tiny.base_model()
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (_gpt2, {}, "expected one of LlamaForCausalLM, .*Gemma3ForCausalLM.* got .*GPT2LMHeadModel"),
        (_namesake, {}, r"expected one of .* of transformers, got test_patch\.LlamaForCausalLM"),
        (_strange_linear, {}, "model.layers.1.self_attn.q_proj: expected nn.Linear,.* got .*Linear8bitLt"),
        (_hooked, {}, "own forward, got one set on model.layers.0.mlp"),
        (
            tiny.base_model,
            {"target_modules": ("q_proj", "c_attn")},
            r"target_modules: .*q_proj.* got \['c_attn'\]",
        ),
        (tiny.base_model, {"answer_ids": (1, 61)}, "answer_ids: expected ids below the vocabulary's 61"),
        (lambda: tiny.patched(tiny.base_model()), {}, "patched one; call unpatch_model first"),
    ],
    ids=["family", "namesake", "linear", "instance-forward", "target", "answer-ids", "twice"],
)
def test_what_cannot_be_patched_stays_as_it_is(make: Any, options: dict[str, Any], message: str) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        patch_model(model, tiny.config(**options))
    assert snapshot(model) == before


def test_unpatching_what_is_not_patched() -> None:
    with pytest.raises(InputError, match="expected a patched model"):
        unpatch_model(tiny.base_model())
    model, _ = pair()
    model.forward = model.forward  # as accelerate's mixed precision does
    with pytest.raises(InputError, match="one set on the model itself"):
        unpatch_model(model)
    del model.forward
    model.__class__ = type("FSDPLlama", (type(model),), {})
    with pytest.raises(InputError, match="undo that change first"):
        unpatch_model(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"r: expected a whole number, at least 1 and less than 2\^31, got 0"),
        ({"alpha": 0}, "alpha: expected a positive number"),
        ({"dropout": 1.0}, "dropout: expected a probability"),
        ({"target_modules": "q_proj"}, "target_modules: expected names"),
        ({"interaction": "half"}, "interaction: expected one of .* got 'half'"),
        ({"gate_init": "zero"}, "gate_init: expected one of"),
        ({"loss": "mse"}, "loss: expected one of"),
        ({"answer_ids": (3, 3)}, "answer_ids: expected two different token ids"),
    ],
)
def test_configurations_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CFLoRAConfig(**options)


# ---- wrong arguments of the patched forward


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3"])
def test_answers_that_begin_from_another_models_log_odds(family: str, layout: str) -> None:
    base = tiny.base_model(family)
    if family == "gemma3":
        base.lm_head = torch.nn.Linear(tiny.HIDDEN, tiny.VOCAB, dtype=base.dtype)
    truth_base = copy.deepcopy(base)
    model = tiny.patched(base)
    truth, made = Truth(truth_base, model), tiny.instances()
    begin = torch.tensor([1.5, -2.0, 0.25])
    out = model(**tiny.batch(made, layout), base_logit=begin)
    logits = truth.choice_logits(made) + torch.stack([torch.zeros(3), begin], dim=1)
    loss = F.cross_entropy(logits, torch.tensor([int(one.tokens[-1] == YES) for one in made]))
    close(out.loss, loss)
    close(out.answer_logits, logits.detach())
    close(tiny.gradients(model, out.loss), tiny.true_gradients(model, loss))
    model.eval()
    arguments = tiny.batch(made, layout, answers=False)
    close(answer_logits(model, **arguments, base_logit=begin), logits.detach())


def test_a_base_of_zero_changes_nothing() -> None:
    """Instances without a label, a denominator, autocast and compilation included."""
    model, _ = pair()
    arguments = tiny.batch(tiny.instances())
    arguments["labels"][1] = -100
    for more in ({}, {"num_items_in_batch": 5}):
        plain, based = (model(**arguments, **more, **base) for base in ({}, {"base_logit": torch.zeros(3)}))
        close(based.loss, plain.loss)
        assert_close(based.answer_logits, plain.answer_logits, equal_nan=True)
        close(tiny.gradients(model, based.loss), tiny.gradients(model, plain.loss))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(compiled(**arguments, base_logit=torch.zeros(3)).loss, model(**arguments).loss)
    with torch.autocast("cpu", torch.bfloat16):
        based, plain = model(**arguments, base_logit=torch.zeros(3)), model(**arguments)
    assert_close(based.loss, plain.loss)
    assert based.loss.dtype == plain.loss.dtype
    for base in ({}, {"base_logit": torch.zeros(3)}):
        with pytest.raises(InputError, match="denominator: expected a positive number, got 0"):
            model(**arguments, **base, num_items_in_batch=torch.tensor(0))
        labels = arguments["labels"].where(arguments["labels"] < 0, 9)
        with pytest.raises(InputError, match=r"labels: expected choice_ids \(.*\) or -100, got 9"):
            model(**arguments | {"labels": labels}, **base)
    arguments["labels"][:] = -100
    loss = model(**arguments, base_logit=torch.zeros(3)).loss
    assert loss == 0
    assert all(gradient.abs().max() == 0 for gradient in tiny.gradients(model, loss).values())


def _wrong(**changes: Any) -> Any:
    def change(arguments: dict[str, Any]) -> dict[str, Any]:
        return arguments | {
            name: value(arguments) if callable(value) else value for name, value in changes.items()
        }

    return change


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        (
            "right",
            _wrong(instance_embed=torch.zeros(3, 4)),
            r"instance_embed: expected shape \(B, cond_dim = 5\)",
        ),
        ("right", _wrong(instance_embed=torch.zeros(2, 5)), "instance_embed: expected B = 3 rows, got 2"),
        ("packed", _wrong(instance_embed=torch.zeros(1, 5)), "instance_embed: expected B = 3 rows, got 1"),
        ("right", _wrong(item_ids=None), "item_ids: expected the items of the placeholders"),
        (
            "right",
            _wrong(item_ids=lambda a: a["item_ids"][:, :2]),
            "expected 3 ids in row 1, .*, got 2",
        ),
        (
            "right",
            _wrong(item_ids=lambda a: a["item_ids"].clamp(min=0)),
            "expected 2 ids in row 0, .*, got 3",
        ),
        ("right", _wrong(item_ids=lambda a: a["item_ids"].flip(1)), "-1 at the end of a row"),
        ("right", _wrong(item_ids=lambda a: a["item_ids"] + 1), "expected 2 ids in row 0, .*, got 3"),
        (
            "right",
            _wrong(item_ids=lambda a: a["item_ids"].where(a["item_ids"] != 10, 11)),
            r"\[0, 11\), padded with -1, got 11",
        ),
        ("right", _wrong(item_ids=torch.zeros(2, 3)), r"item_ids: expected integers of shape \(B = 3, K\)"),
        ("right", _wrong(input_ids=None), "input_ids: expected token ids"),
        (
            "right",
            _wrong(instance_embed=lambda a: a["instance_embed"].tolist()),
            "instance_embed: expected a tensor, got list",
        ),
        (
            "right",
            _wrong(item_ids=lambda a: a["item_ids"].numpy()),
            "item_ids: expected a tensor, got ndarray",
        ),
        (
            "packed",
            _wrong(cu_seqlens=lambda a: a["cu_seqlens"].tolist()),
            "cu_seqlens: expected a tensor, got list",
        ),
        ("right", _wrong(labels=lambda a: a["labels"][:, :-1]), "labels: expected shape"),
        ("right", _wrong(labels=lambda a: a["labels"].where(a["labels"] < 0, 9)), "labels"),
        ("right", _wrong(cu_seqlens=torch.tensor([0, 10])), "cu_seqlens: expected .* int32"),
        ("packed", _wrong(cu_seqlens=lambda a: a["cu_seqlens"] - 1), "offsets rising from 0 to T = 22"),
        (
            "packed",
            _wrong(cu_seqlens=lambda a: torch.cat([a["cu_seqlens"][:1], a["cu_seqlens"]])),  # an empty one
            "offsets rising from 0 to T = 22, got .0, 0, ",
        ),
        (
            "packed",
            _wrong(attention_mask=lambda a: a["input_ids"]),
            "attention_mask: expected None for a packed",
        ),
        (
            "right",
            _wrong(attention_mask=lambda a: a["attention_mask"].tolist()),
            "attention_mask: expected a tensor, got list",
        ),
        (
            "right",
            _wrong(attention_mask=lambda a: a["attention_mask"][:, 1:]),
            r"attention_mask: expected shape \(3, \d+\), that of the tokens, got",
        ),
        (
            "right",
            _wrong(item_id=1),
            "item_id: expected an argument of the patched forward, perhaps item_ids",
        ),
        ("right", _wrong(instance_embeds=None), "instance_embeds: expected .*, perhaps instance_embed"),
        ("packed", _wrong(use_cache=True), "use_cache: expected no key-value cache"),
        ("packed", _wrong(max_seqlen=9), "max_seqlen: expected the longest instance's 10 at least, got 9"),
        ("right", _wrong(base_logit=torch.zeros(3, 1)), r"base_logit: expected shape \(3,\), got \(3, 1\)"),
        ("packed", _wrong(base_logit=torch.zeros(1)), r"base_logit: expected shape \(3,\), got \(1,\)"),
        ("right", _wrong(base_logit=torch.zeros(3), labels=None), "base_logit: expected None without labels"),
    ],
)
def test_arguments_that_do_not_fit(layout: str, change: Any, message: str) -> None:
    model, _ = pair()
    with pytest.raises(InputError, match=message):
        model(**change(tiny.batch(tiny.instances(), layout)))


def test_gates_that_nobody_feeds_are_noticed() -> None:
    model, _ = pair()
    arguments = tiny.batch(tiny.instances())
    del arguments["instance_embed"]
    with pytest.warns(UserWarning, match="instance_embed: expected one where gates are trained, got None"):
        model.train()(**arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(**arguments)
        model.rellax.set_trainable(gates=False)
        model.train()(**arguments)


def test_a_replica_of_data_parallel_is_refused() -> None:
    """As `nn.DataParallel` makes it, and transformers' Trainer on a machine of several GPUs."""
    model, _ = pair()
    with pytest.raises(InputError, match=r"replica of nn.DataParallel.*DistributedDataParallel"):
        model._replicate_for_data_parallel()(**tiny.batch(tiny.instances()))


def test_arguments_for_parts_the_model_does_not_have() -> None:
    model, _ = pair(soft_prompt=False, interaction="none", answer_ids=None)
    arguments = tiny.batch(tiny.instances(placeholders=False))
    with pytest.raises(InputError, match=r'instance_embed: .* interaction="none"'):
        model(**arguments)
    del arguments["instance_embed"]
    with pytest.raises(InputError, match=r"item_ids: .* without soft_prompt"):
        model(**arguments, item_ids=torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(InputError, match=r"answer_ids: .* rellax.ctr.prompts.answer_ids\(tokenizer\)"):
        model(**arguments)
    with pytest.raises(InputError, match="gates: expected False"):
        model.rellax.set_trainable(gates=True)
    model, _ = pair(loss="vocab")
    with pytest.raises(InputError, match="base_logit: expected None with loss='vocab'"):
        model(**tiny.batch(tiny.instances()), base_logit=torch.zeros(3))
