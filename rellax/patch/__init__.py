"""Hugging Face models: patch, unpatch, save, load."""

from rellax.patch.adapter import export_peft, load_adapter, save_adapter
from rellax.patch.compiled import compile_frozen
from rellax.patch.config import CFLoRAConfig, SoftPromptConfig
from rellax.patch.engine import answer_logits, packing_pays, patch_model, unpatch_model
from rellax.patch.published import load_published

__all__ = [
    "CFLoRAConfig",
    "SoftPromptConfig",
    "answer_logits",
    "compile_frozen",
    "export_peft",
    "load_adapter",
    "load_published",
    "packing_pays",
    "patch_model",
    "save_adapter",
    "unpatch_model",
]
