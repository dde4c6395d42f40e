"""The stage-2 training step as it is published, and the frozen body: what a step is measured against."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from rellax.patch import attention


def sharing(model: Any) -> Any:
    """A copy of a model that has the very parameters of the original."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


class PublishedModel(nn.Module):
    """Stage 2 as published: padded prompts, logits of all positions, and of each adapted layer a module.

    Args:
        model: an unpatched model; it is changed in place.
        patched: a patched one, whose weights this one starts with.
    """

    def __init__(self, model: Any, patched: Any) -> None:
        super().__init__()
        state = patched.rellax
        self.model, self.placeholder_ids = model.requires_grad_(False), state.soft_prompt.placeholder_ids
        self.item_embeddings = state.soft_prompt.item_embeddings
        self.projector = copy.deepcopy(state.soft_prompt.projector)
        self.adapted = []
        for index, (name, projection) in enumerate(state.projections.items()):
            gate = _gate(state.gate_bank, index)
            self.adapted.append(_PublishedLinear(model.get_submodule(name), projection, gate))
            model.set_submodule(name, self.adapted[-1])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        item_ids: Tensor,
        instance_embed: Tensor,
        **_: object,
    ) -> Tensor:
        """The loss over the vocabulary, from a padded batch as `rellax.ctr.batches.Collator` makes it."""
        embeds = self._embeds(input_ids, item_ids, instance_embed)
        out = self.model(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels, use_cache=False)
        loss: Tensor = out.loss
        return loss

    @torch.inference_mode()
    def probabilities(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        item_ids: Tensor,
        instance_embed: Tensor,
        answer_ids: tuple[int, int],
    ) -> Tensor:
        """P(Yes) of each prompt of such a batch, from logits of all positions."""
        embeds = self._embeds(input_ids, item_ids, instance_embed)
        logits = self.model(inputs_embeds=embeds, attention_mask=attention_mask, use_cache=False).logits
        last = attention_mask.sum(1) - 1
        answers = logits[torch.arange(len(logits)), last][:, list(answer_ids)]
        return answers.double().softmax(-1)[:, 1]

    def _embeds(self, input_ids: Tensor, item_ids: Tensor, instance_embed: Tensor) -> Tensor:
        for layer in self.adapted:
            layer.instance_embed = instance_embed
        soft = torch.isin(input_ids, self.placeholder_ids)
        embeds = self.model.get_input_embeddings()(input_ids.masked_fill(soft, 0))
        rows = self.projector(self.item_embeddings[item_ids]).to(embeds.dtype)  # those of the padding unused
        for b in range(len(embeds)):
            placeholders = soft[b].nonzero().squeeze(1)
            embeds[b, placeholders] = rows[b, : len(placeholders)]
        return embeds


class _PublishedLinear(nn.Module):
    """A frozen linear layer with an adapter in fp32, and a hypernetwork of its own."""

    instance_embed: Tensor

    def __init__(self, linear: nn.Linear, projection: Any, gate: nn.Sequential) -> None:
        super().__init__()
        self.linear, self.gate = linear, gate
        self.lora_a, self.lora_b, self.scale = projection.lora_a, projection.lora_b, projection.scale
        self.dropout = nn.Dropout(projection.dropout)

    def forward(self, x: Tensor) -> Tensor:
        r = self.lora_a.shape[0]
        gate = self.gate(self.instance_embed).view(-1, r, r)
        h = self.dropout(x.float()) @ self.lora_a.t()
        return self.linear(x) + (h @ gate @ self.lora_b.t() * self.scale).to(x.dtype)


def _gate(bank: Any, index: int) -> nn.Sequential:
    """One projection's hypernetwork, as the modules that compute it."""
    norm = nn.LayerNorm(bank.cond_dim)
    first, second = (nn.Linear(w.shape[2], w.shape[1]) for w in (bank.w1, bank.w2))
    layers = nn.Sequential(norm, first, nn.GELU(), second).to(bank.w1)
    weights = (bank.ln_weight, bank.ln_bias, bank.w1, bank.b1, bank.w2, bank.b2)
    with torch.no_grad():
        for parameter, weight in zip(layers.parameters(), weights, strict=True):
            parameter.copy_(weight[index])
    return layers


class FrozenBody:
    """The decoder alone, forward and backward: gradients for its input only, packed, no vocabulary."""

    def __init__(self, model: Any) -> None:
        attention.adopt(model.config)
        self.model = model.requires_grad_(False).train()

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """The gradient of the embeddings for a random one of the hidden states."""
        words = self.model.get_input_embeddings()
        embeds = words(input_ids.clamp(max=words.num_embeddings - 1)).requires_grad_()
        hidden = self._hidden(embeds, position_ids, cu_seqlens, max_seqlen)
        (gradient,) = torch.autograd.grad(hidden, embeds, torch.randn_like(hidden))
        return gradient

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """The hidden states alone."""
        words = self.model.get_input_embeddings()
        embeds = words(input_ids.clamp(max=words.num_embeddings - 1))
        return self._hidden(embeds, position_ids, cu_seqlens, max_seqlen)

    def _hidden(self, embeds: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        hidden: Tensor = self.model.base_model(
            inputs_embeds=embeds,
            attention_mask=cu_seqlens.new_empty(1, 1, 0, 0),  # given one, transformers makes none
            position_ids=position_ids,
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=max_seqlen,
            max_length_k=max_seqlen,
        ).last_hidden_state
        return hidden
