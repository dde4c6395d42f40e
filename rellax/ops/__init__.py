"""Operators: one contract each, whatever the backend."""

from rellax.ops.answer import answer_loss
from rellax.ops.cflora import cflora_linear, cflora_linears, cflora_tiles, cflora_update
from rellax.ops.gate_bank import gate_bank
from rellax.ops.history_topk import history_topk
from rellax.ops.item_topk import item_topk
from rellax.ops.soft_prompt import soft_prompt

__all__ = [
    "answer_loss",
    "cflora_linear",
    "cflora_linears",
    "cflora_tiles",
    "cflora_update",
    "gate_bank",
    "history_topk",
    "item_topk",
    "soft_prompt",
]
