"""What patched modules do: mixins put in front of the class a module already has.

One `ForwardContext` per call of the model travels as a keyword argument to every attention block, which hands
the adapted projections of its decoder layer their gates just before they run: attention is the one block that
gets the keywords, and the first to run in its layer, also when a checkpointed layer is computed again.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput, can_return_tuple

from rellax.errors import InputError
from rellax.nn import SoftPrompt
from rellax.nn.answer import add_base
from rellax.nn.cflora import CFLoRA, forward_together
from rellax.ops import cflora_tiles
from rellax.ops import soft_prompt as embed_prompt
from rellax.patch import attention, checkpoint
from rellax.patch.config import CFLoRAConfig
from rellax.patch.state import RellaxState

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""What transformers' attention functions call the offsets of a packed batch and its longest instance."""

CACHE = "cache" if hasattr(BaseModelOutputWithPast, "cache") else "past_key_values"
"""What transformers calls a key-value cache, from 5.24 on and before."""


class Handed(NamedTuple):
    """What attention hands to a projection; without a gate all tokens are treated alike."""

    gate: Tensor | None = None
    cu_seqlens: Tensor | None = None
    tiles: Tensor | None = None


class ForwardContext:
    """What one call of the model hands to its layers: each projection's gate (B, r, r), and the packing.

    No dataclass: FSDP2 looks for tensors in those, and would put nodes of its own between gates and layers.
    """

    def __init__(self, gates: tuple[Tensor, ...] | None, cu_seqlens: Tensor | None, tokens: int) -> None:
        self.gates = gates
        self.cu_seqlens = cu_seqlens
        self.tiles = None
        if gates is not None and cu_seqlens is not None and cu_seqlens.is_cuda:
            self.tiles = cflora_tiles(cu_seqlens, tokens)

    def hand(self, gate_index: int) -> Handed:
        """What the projection with this place in the gate bank gets."""
        return Handed() if self.gates is None else Handed(self.gates[gate_index], self.cu_seqlens, self.tiles)


@dataclass
class AnswerOutput(ModelOutput):
    """What a patched model returns for labels.

    Attributes:
        loss: () fp32.
        answer_logits: (B, 2) fp32, [No, Yes] at each instance's first label, without gradient; NaN where it
            has no label, None where the configuration has no answer_ids.
        cache, hidden_states, attentions: the decoder's.
    """

    loss: Tensor | None = None
    answer_logits: Tensor | None = None
    cache: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class InFlight(threading.local):
    """What a projection has been handed, and the output that is ready for it: in each thread its own."""

    def __init__(self) -> None:
        self.handed: Handed | None = None
        self.ready: tuple[Tensor, Tensor] | None = None

    def __reduce__(self) -> tuple[type[InFlight], tuple[()]]:
        """A copy of a module is in the middle of no call."""
        return InFlight, ()


class Projection(CFLoRA):
    """An adapted linear layer: takes what attention handed it, once.

    Of layers that share their input the first one to run computes all that are like it, in one pass over it.
    The others find their output ready, and take it only for the very tensor it was computed from.
    """

    rellax_base: type[nn.Module]
    gate_index: int
    sharing: Sequence[Projection] = ()
    in_flight: InFlight

    def adopt(self, config: CFLoRAConfig) -> None:
        """Called once, on a module whose class has just become this one: add what it lacks."""
        self.in_flight = InFlight()

    def release(self) -> None:
        """Take away what `adopt` and patching added, all of it or a part."""
        for name in ("in_flight", "gate_index", "sharing"):
            vars(self).pop(name, None)

    def likeness(self: Any) -> tuple[Any, ...] | None:
        """What layers must have in common to run as one; None: this one has no update now.

        Of layers that accelerate offloads, one whose turn has not come is on no device.
        """
        devices = self.weight.device, self.lora_a.device
        return self.scale, self.dropout if self.training else 0.0, self.lora_a.shape, devices

    def receive(self, handed: Handed | None) -> None:
        """Take what this thread's next call needs, and forget what an earlier call left."""
        self.in_flight.handed, self.in_flight.ready = handed, None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        handed, ready = self.in_flight.handed, self.in_flight.ready
        self.receive(None)
        if ready is not None and ready[0] is x:
            return ready[1]
        if handed is None:
            return super().forward(x)
        waiting = [layer for layer in self.sharing if layer.in_flight.handed is not None]
        likeness = self.likeness() if waiting else None
        waiting = [layer for layer in waiting if layer.likeness() == likeness]
        rows = x if handed.cu_seqlens is None else x.squeeze(0)
        gates: list[Any] = [layer.in_flight.handed.gate for layer in waiting if layer.in_flight.handed]
        # Layers of a model may be on several GPUs.
        gate, cu_seqlens, tiles = (None if part is None else part.to(x.device) for part in handed)
        first, *others = forward_together(
            [self, *waiting],
            rows,
            None if gate is None else [gate, *(other.to(x.device) for other in gates)],
            cu_seqlens=cu_seqlens,
            tiles=tiles,
        )
        for layer, y in zip(waiting, others, strict=True):
            layer.in_flight.ready = (x, y.view(*x.shape[:-1], y.shape[-1]))
        return first.view(*x.shape[:-1], first.shape[-1])


class Attention(nn.Module):
    """An attention block that hands the projections of its decoder layer their gates."""

    rellax_projections: list[Projection]

    def forward(self, *args: Any, rellax_context: ForwardContext | None = None, **kwargs: Any) -> Any:
        for projection in self.rellax_projections:
            index = projection.gate_index
            projection.receive(Handed() if rellax_context is None else rellax_context.hand(index))
        return super().forward(*args, **kwargs)


class CausalLM(nn.Module):
    """A causal language model that takes instance embeddings, item ids, packed batches and answer labels."""

    rellax: RellaxState
    config: Any
    base_model: Any
    get_input_embeddings: Any
    get_output_embeddings: Any

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        instance_embed: Tensor | None = None,
        item_ids: Tensor | None = None,
        base_logit: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        answer_positions: Tensor | None = None,
        answer_only: bool = False,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own forward, with these additions.

        With labels: an `AnswerOutput`, and no logits over the vocabulary. Without: the model's own output.

        Args:
            cache: the key-value cache; `past_key_values` is the same.
            labels: like input_ids, -100 where nothing is supervised.
            instance_embed: (B, cond_dim), the recommendation model's view of each instance; None: plain LoRA.
            item_ids: (B, K) int64 padded with -1; packed: (1, n). The k-th placeholder takes the k-th id.
            base_logit: (B,), log-odds of Yes that the answers begin from, as the recommendation model's: they
                are added to the answer logits, and to those in the choice loss, so that what is learnt is
                what they lack. XGBoost calls it base_margin.
            cu_seqlens: (B + 1,) int32: input_ids is (1, T), B instances one after another; `cu_seq_lens_q` is
                the same.
            max_seqlen: the longest instance of a packed batch; `max_length_q` is the same. A GPU is waited
                for where it is not given.
            answer_positions: (n,) int64, rising: the tokens before the labels, in the flattened batch. The
                vocab loss waits for a GPU to count the labels where they are not given.
            answer_only: return only `answer_logits`, at the last token of each instance.
            num_items_in_batch: a number of labels that the sum of losses is divided by, as `Trainer` counts
                those of a step's micro-batches. The choice loss, which reads one label an instance, takes the
                share of it that it reads of this batch's labels. None: the number of labels that are read.

        Raises:
            InputError: an argument does not fit the others or the configuration, or `nn.DataParallel` calls.
        """
        if getattr(self, "_is_replica", False):
            raise InputError(
                "model: expected no replica of nn.DataParallel, whose gates would be lost, got one; use "
                "DistributedDataParallel (torchrun), or one GPU"
            )
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise InputError("input_ids: expected token ids, got None (and no inputs_embeds)")
        cache = past_key_values if cache is None else cache
        given = {name: kwargs.pop(name, None) for name in PACKING}
        cu_seqlens = given["cu_seq_lens_q"] if cu_seqlens is None else cu_seqlens
        _check_tensors(
            input_ids=input_ids,
            instance_embed=instance_embed,
            item_ids=item_ids,
            base_logit=base_logit,
            cu_seqlens=cu_seqlens,
            answer_positions=answer_positions,
            labels=labels,
        )
        _check_mask(attention_mask, tokens, cache)
        _check_names(kwargs)
        if cu_seqlens is not None:
            longest = given["max_length_q"] if max_seqlen is None else max_seqlen
            _check_packed(tokens, cu_seqlens, longest, attention_mask, cache, use_cache)
            use_cache = False
            if position_ids is None:
                position_ids = _packed_positions(cu_seqlens, tokens.shape[1])
            if attention.runs_by_segment(self.config, self.get_input_embeddings().weight):
                attention_mask = cu_seqlens.new_empty(1, 1, 0, 0)  # given one, transformers makes none
            if attention_mask is not None or "flash" in self.config._attn_implementation:
                longest = int(cu_seqlens.diff().max()) if longest is None else longest
                kwargs |= dict(zip(PACKING, (cu_seqlens, cu_seqlens, longest, longest), strict=True))

        instances = tokens.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        stacked = self._rellax_gates(instance_embed, instances)
        gates = None if stacked is None else stacked.unbind(0)
        inputs_embeds = self._rellax_embeds(input_ids, inputs_embeds, item_ids)
        if checkpoint.is_reentrant(self.base_model.layers):
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            inputs_embeds, gates = checkpoint.enter(inputs_embeds, stacked)

        kwargs |= {
            "input_ids": input_ids if inputs_embeds is None else None,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            CACHE: cache,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            "rellax_context": ForwardContext(gates, cu_seqlens, tokens.shape[1]),
        }
        if labels is None and not answer_only:
            if base_logit is not None:
                raise InputError("base_logit: expected None without labels, but in `rellax.answer_logits`")
            return super().forward(**kwargs, logits_to_keep=logits_to_keep)
        if base_logit is not None and base_logit.shape != (instances,):
            raise InputError(f"base_logit: expected shape ({instances},), got {tuple(base_logit.shape)}")
        labels = None if answer_only else labels
        return self._rellax_answer(kwargs, labels, cu_seqlens, answer_positions, base_logit)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *,
        inputs_embeds: Tensor | None = None,
        soft_rows: Tensor | None = None,
        soft_index: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The model's own, with the embeddings of a prompt that `_expand_inputs_for_generation` has read."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        tokens = inputs.get("input_ids")
        if soft_rows is None or soft_index is None or tokens is None:
            return inputs
        prompt, end = soft_index.shape[1], input_ids.shape[1]
        if end < prompt:  # these are a chunk of the prompt, that after the cached ones
            end += int(inputs[CACHE].get_seq_length())
            if end > prompt:
                raise InputError(
                    "prefill_chunk_size: expected None beside a cache whose tokens input_ids lack"
                )
        start = end - tokens.shape[1]
        index = F.pad(soft_index, (0, max(end - prompt, 0)), value=-1)[:, start:end]
        table = self.get_input_embeddings()
        scale = getattr(table, "embed_scale", None)
        embeds = embed_prompt(tokens, table.weight, soft_rows, index, word_scale=scale)
        return inputs | {"input_ids": None, "inputs_embeds": embeds}

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, which `generate` calls once, with the whole prompt.

        Its placeholders stand for items. One that is generated later is a word.
        """
        soft_prompt, rows = self.rellax.soft_prompt, None
        if soft_prompt is not None:
            ids, item_ids = kwargs["input_ids"].to(self.device), kwargs.pop("item_ids", None)
            _check_tensors(item_ids=item_ids)
            if kwargs.get("inputs_embeds") is not None:
                ids = ids[:, :0]  # they are embedded
            if item_ids is None:
                _check_no_placeholder(soft_prompt, ids)
                item_ids = ids.new_empty(len(ids), 0)
            rows, kwargs["soft_index"] = soft_prompt.locate(ids, item_ids.to(self.device))
        ids, expanded = super()._expand_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        return ids, expanded if rows is None else expanded | {"soft_rows": rows}

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """The model's own, with an adapter in the folder `rellax` beside it.

        `from_pretrained` reads the base weights back and tells of tensors that it has no use for; these are
        what `Trainer` resumes from. `load_adapter` takes the same folder.
        """
        from rellax.patch.adapter import save_beside  # which builds on this module

        if is_main_process:
            save_beside(self, save_directory, state_dict)
        super().save_pretrained(  # type: ignore[misc]
            save_directory, is_main_process, state_dict, *args, **kwargs
        )

    def _rellax_gates(self, instance_embed: Tensor | None, instances: int) -> Tensor | None:
        bank = self.rellax.active_bank()
        if instance_embed is None:
            if self.training and bank is not None and not torch.compiler.is_compiling():
                _warn_of_idle_gates(bank)
            return None
        if bank is None:
            raise InputError('instance_embed: expected None, the model was patched with interaction="none"')
        gates: Tensor = bank(instance_embed)
        if gates.shape[1] != instances:
            raise InputError(f"instance_embed: expected B = {instances} rows, got {gates.shape[1]}")
        return gates

    def _rellax_embeds(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, item_ids: Tensor | None
    ) -> Tensor | None:
        soft_prompt = self.rellax.soft_prompt
        if item_ids is None:
            if soft_prompt is not None and input_ids is not None:
                _check_no_placeholder(soft_prompt, input_ids)
            return inputs_embeds
        if soft_prompt is None:
            raise InputError("item_ids: expected None, the model was patched without soft_prompt")
        if input_ids is None or inputs_embeds is not None:
            raise InputError("item_ids: expected input_ids alone beside them, got inputs_embeds")
        table = self.get_input_embeddings()
        return soft_prompt(input_ids, item_ids, table.weight, getattr(table, "embed_scale", None))

    def _rellax_answer(
        self,
        inputs: dict[str, Any],
        labels: Tensor | None,
        cu_seqlens: Tensor | None,
        positions: Tensor | None,
        base_logit: Tensor | None,
    ) -> AnswerOutput:
        """The decoder, then the answers alone: where the labels are, else at each instance's last token."""
        denominator = inputs.pop("num_items_in_batch", None)
        if inputs["use_cache"] is None and inputs[CACHE] is None:
            inputs["use_cache"] = False  # nothing is generated after an answer
        outputs = self.base_model(**inputs)
        hidden, head = outputs.last_hidden_state, self.rellax.answer_head
        # Of a model on several devices the last layers are not where its inputs are.
        labels, cu_seqlens, positions, base_logit = (
            None if x is None else x.to(hidden.device) for x in (labels, cu_seqlens, positions, base_logit)
        )
        lm_head = self.get_output_embeddings()
        vocabulary = lm_head.weight, lm_head.bias
        loss = None
        if labels is None:
            last = _last_tokens(hidden, inputs["attention_mask"], cu_seqlens)
            logits = head.logits(hidden, last, *vocabulary)
            if base_logit is not None:
                logits = add_base(logits, base_logit)
        else:
            loss, logits = head(
                hidden,
                labels,
                *vocabulary,
                cu_seqlens=cu_seqlens,
                positions=positions,
                denominator=denominator,
                base_logit=base_logit,
            )
        return AnswerOutput(loss, logits, outputs.get(CACHE), outputs.hidden_states, outputs.attentions)


def _check_tensors(**values: Any) -> None:
    for name, value in values.items():
        if value is not None and not isinstance(value, Tensor):
            raise InputError(f"{name}: expected a tensor, got {type(value).__name__}")


def _check_mask(mask: Any, tokens: Tensor, cache: Any) -> None:
    if isinstance(mask, (list, tuple, np.ndarray)):
        raise InputError(f"attention_mask: expected a tensor, got {type(mask).__name__}")
    if isinstance(mask, Tensor) and mask.dim() == 2 and cache is None and mask.shape != tokens.shape[:2]:
        raise InputError(
            f"attention_mask: expected shape {tuple(tokens.shape[:2])}, that of the tokens, "
            f"got {tuple(mask.shape)}"
        )


def _warn_of_idle_gates(bank: nn.Module) -> None:
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in bank.parameters()):
        warnings.warn(
            "instance_embed: expected one where gates are trained, got None: for this batch the model is "
            "plain LoRA, and gates learn nothing from it (Trainer drops columns that forward does not name)",
            stacklevel=4,
        )


def _check_names(others: Iterable[str]) -> None:
    """Raise for what is nearly the name of an argument: transformers takes any, and does nothing with it."""
    for name in () if torch.compiler.is_compiling() else others:
        if (meant := _meant(name)) is not None:
            raise InputError(f"{name}: expected an argument of the patched forward, perhaps {meant}")


@functools.cache
def _meant(name: str) -> str | None:
    own = inspect.signature(CausalLM.forward).parameters.keys() - {"self", "kwargs"}
    return next(iter(difflib.get_close_matches(name, sorted(own), cutoff=0.9)), None)


def _check_no_placeholder(soft_prompt: SoftPrompt, input_ids: Tensor) -> None:
    readable = not torch.compiler.is_compiling() and not input_ids.is_meta
    if readable and soft_prompt.is_placeholder(input_ids).any():
        raise InputError("item_ids: expected the items of the placeholders in input_ids, got None")


def _check_packed(
    tokens: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    attention_mask: Any,
    cache: Any,
    use_cache: bool | None,
) -> None:
    if tokens.shape[0] != 1 or cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32:
        raise InputError(
            "cu_seqlens: expected (B + 1,) int32 beside input_ids of shape (1, T), "
            f"got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)} beside {tuple(tokens.shape[:2])}"
        )
    if attention_mask is not None:
        raise InputError("attention_mask: expected None for a packed batch, which has no padding")
    if cache is not None or use_cache:
        raise InputError("use_cache: expected no key-value cache for a packed batch")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != tokens.shape[1] or any(a >= b for a, b in pairwise(ends)):
            raise InputError(
                f"cu_seqlens: expected offsets rising from 0 to T = {tokens.shape[1]}, got {ends}"
            )
        longest = max(b - a for a, b in pairwise(ends))
        if max_seqlen is not None and max_seqlen < longest:
            raise InputError(
                f"max_seqlen: expected the longest instance's {longest} at least, got {max_seqlen}"
            )


def _packed_positions(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Positions (1, T) that start at 0 in each instance: transformers finds the boundaries by them."""
    token = torch.arange(tokens, device=cu_seqlens.device)
    starts = cu_seqlens[:-1].long()
    return (token - starts[torch.bucketize(token, starts, right=True) - 1])[None]


def _last_tokens(hidden: Tensor, attention_mask: Any, cu_seqlens: Tensor | None) -> Tensor:
    """Flat positions (B,) of each instance's last real token."""
    if cu_seqlens is not None:
        return cu_seqlens[1:].long() - 1
    batch, length = hidden.shape[:2]
    first = torch.arange(0, batch * length, length, device=hidden.device)
    if attention_mask is None:
        return first + length - 1
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        raise InputError("attention_mask: expected shape (B, L) to find the last tokens")
    real = attention_mask[:, -length:].to(hidden.device) != 0
    return first + torch.arange(length, device=hidden.device).where(real, 0).amax(1)
