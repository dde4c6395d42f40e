"""Modules over the operators."""

from rellax.nn.answer import AnswerHead
from rellax.nn.cflora import CFLoRALinear
from rellax.nn.gate_bank import GateBank
from rellax.nn.soft_prompt import SoftPrompt

__all__ = ["AnswerHead", "CFLoRALinear", "GateBank", "SoftPrompt"]
