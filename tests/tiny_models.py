"""Tiny random models of every supported family, batches for them, and what a patched one must compute.

The truth runs one instance at a time, unpadded, through an unpatched transformers model whose adapted weights
are written out: W + s · B Gᵀ A with the gates of that instance, soft prompts as given input embeddings.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rellax.patch import CFLoRAConfig, SoftPromptConfig, patch_model

VOCAB, HIDDEN, ITEMS, ITEM_SIZE, COND = 61, 32, 11, 6, 5
NO, YES = 4, 7
PLACEHOLDERS = (60, 70)  # the second is outside of the vocabulary
LENGTHS = (7, 10, 5)
HISTORIES = ((3, 8), (8, 0, 10), ())  # items of each instance's placeholders

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
_MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "attention_bias": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 4}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "gemma": (GemmaForCausalLM, GemmaConfig, {}),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {"sliding_window": 4, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "sliding_window": 4,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "final_logit_softcapping": 3.0,
        },
    ),
}
FAMILIES = tuple(_MODELS)
LAYOUTS = ("right", "left", "packed")
TARGETS = ("q_proj", "v_proj", "down_proj")


def base_model(family: str = "llama", seed: int = 0, dtype: torch.dtype | None = None) -> Any:
    """A random model in training mode, with norms and biases that are not trivial either.

    In fp64, but Gemma 2: its attention masks with the dtype's minimum, and in fp32 that of fp64 is -inf.
    """
    torch.manual_seed(seed)
    dtype = dtype or (torch.float32 if family == "gemma2" else torch.float64)
    model_class, config_class, options = _MODELS[family]
    model = model_class(config_class(**_COMMON | options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


def config(**options: Any) -> CFLoRAConfig:
    defaults: dict[str, Any] = {
        "r": 3,
        "alpha": 5,
        "dropout": 0.0,
        "target_modules": TARGETS,
        "cond_dim": COND,
        "gate_init": "kaiming",
        "answer_ids": (NO, YES),
    }
    return CFLoRAConfig(**defaults | options)


def soft_prompt_config(seed: int = 1) -> SoftPromptConfig:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(ITEMS, ITEM_SIZE, generator=generator, dtype=torch.float64)
    return SoftPromptConfig(table, PLACEHOLDERS)


def patched(model: Any, *, soft_prompt: bool = True, **options: Any) -> Any:
    """The model patched, with every new parameter random."""
    patch_model(model, config(**options), soft_prompt=soft_prompt_config() if soft_prompt else None)
    randomise(model)
    return model


def randomise(model: Any, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)


@dataclass
class Instance:
    """One prompt: its last token is the answer, the only label."""

    tokens: Tensor
    items: list[int]
    embed: Tensor


def instances(seed: int = 3, *, placeholders: bool = True) -> list[Instance]:
    """Prompts of several lengths and numbers of placeholders, each of another user."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length, history in zip(LENGTHS, HISTORIES, strict=True):
        tokens = torch.randint(8, VOCAB - 1, (length,), generator=generator)
        items = list(history) if placeholders else []
        where = torch.randperm(length - 2, generator=generator)[: len(items)] + 1
        tokens[where] = torch.tensor(PLACEHOLDERS)[torch.randint(0, 2, (len(items),), generator=generator)]
        tokens[-1] = (NO, YES)[int(torch.randint(0, 2, (), generator=generator))]
        made.append(Instance(tokens, items, torch.randn(COND, generator=generator, dtype=torch.float64)))
    return made


def batch(made: list[Instance], layout: str = "right", *, answers: bool = True) -> dict[str, Tensor]:
    """Arguments of the patched model: padded on one side, or packed; with labels, or without the answers."""
    tokens = [one.tokens if answers else one.tokens[:-1] for one in made]
    length = max(len(t) for t in tokens)
    arguments = {"instance_embed": torch.stack([one.embed for one in made])}
    if layout == "packed":
        ends = torch.tensor([0, *(len(t) for t in tokens)]).cumsum(0)
        arguments["input_ids"] = torch.cat(tokens)[None]
        arguments["cu_seqlens"] = ends.to(torch.int32)
        items = [[item for one in made for item in one.items]]
        last = ends[1:] - 1
        labels = torch.full_like(arguments["input_ids"], -100)
        labels[0, last] = arguments["input_ids"][0, last]
    else:
        sides = [(length - len(t), 0) if layout == "left" else (0, length - len(t)) for t in tokens]
        pads = [F.pad(torch.ones_like(t), side) for t, side in zip(tokens, sides, strict=True)]
        arguments["input_ids"] = torch.stack([F.pad(t, s) for t, s in zip(tokens, sides, strict=True)])
        arguments["attention_mask"] = torch.stack(pads)
        items = [one.items for one in made]
        labels = torch.full_like(arguments["input_ids"], -100)
        for row, (t, side) in enumerate(zip(tokens, sides, strict=True)):
            labels[row, side[0] + len(t) - 1] = t[-1]
    if any(items):
        width = max(len(row) for row in items)
        arguments["item_ids"] = torch.tensor([row + [-1] * (width - len(row)) for row in items])
    if answers:
        arguments["labels"] = labels
    return arguments


class Truth:
    """What a patched model must compute, by an unpatched copy of its base and the same parameters."""

    def __init__(self, base: Any, model: Any) -> None:
        self.base = copy.deepcopy(base).requires_grad_(False)
        self.model = model

    def gates(self, embed: Tensor) -> list[Tensor]:
        """The hypernetwork for one instance, one projection after the other."""
        bank, gates = self.model.rellax.gate_bank, []
        embed = embed.to(bank.w1.dtype)
        for m in range(len(self.model.rellax.projections)):
            x = F.layer_norm(embed, embed.shape, bank.ln_weight[m], bank.ln_bias[m])
            out = bank.w2[m] @ F.gelu(bank.w1[m] @ x + bank.b1[m]) + bank.b2[m]
            gates.append(
                torch.diag(out) if bank.interaction == "diagonal" else out.view(bank.rank, bank.rank)
            )
        return gates

    def weights(self, embed: Tensor | None) -> dict[str, Tensor]:
        """W + s · B Gᵀ A of each adapted projection."""
        projections = self.model.rellax.projections
        weights = {}
        for m, (name, projection) in enumerate(projections.items()):
            gate = torch.eye(self.model.rellax.config.r) if embed is None else self.gates(embed)[m]
            update = (
                projection.scale
                * projection.lora_b
                @ gate.to(projection.lora_b.dtype).t()
                @ projection.lora_a
            )
            base = self.base.get_parameter(f"{name}.weight")
            weights[f"{name}.weight"] = (base + update).to(base.dtype)
        return weights

    def logits(self, one: Instance, *, gated: bool = True) -> Tensor:
        """The logits (L, V) of one instance."""
        soft_prompt = self.model.rellax.soft_prompt
        is_soft = torch.isin(one.tokens, torch.tensor(PLACEHOLDERS))
        is_soft &= is_soft.cumsum(0) <= len(one.items)  # any after those was generated: a word
        embeds = self.base.get_input_embeddings()(one.tokens.masked_fill(is_soft, 0))
        if one.items:
            first, _, second = soft_prompt.projector
            row = soft_prompt.item_embeddings[one.items] @ first.weight.t() + first.bias
            soft = F.gelu(row) @ second.weight.t() + second.bias
            embeds = embeds.index_put((is_soft.nonzero()[:, 0],), soft.to(embeds.dtype))
        weights = self.weights(one.embed if gated else None)
        return functional_call(self.base, weights, kwargs={"inputs_embeds": embeds[None]}).logits[0]

    def choice_logits(self, made: list[Instance], *, gated: bool = True) -> Tensor:
        """[No, Yes] of each instance, (B, 2), at the token before its answer."""
        return torch.stack([self.logits(one, gated=gated)[-2, [NO, YES]] for one in made])

    def choice_loss(self, made: list[Instance], *, gated: bool = True) -> Tensor:
        labels = torch.tensor([int(one.tokens[-1] == YES) for one in made])
        return F.cross_entropy(self.choice_logits(made, gated=gated), labels)


def trainable(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every trainable parameter, by backward() on a model without gradients."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad for name, p in trainable(model).items()}
    assert all(grad is not None for grad in found.values()), [n for n, grad in found.items() if grad is None]
    return {name: grad.clone() for name, grad in found.items()}


def true_gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    parameters = trainable(model)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
