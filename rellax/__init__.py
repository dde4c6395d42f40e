"""Kernels and Hugging Face patches for LLM-based click-through-rate prediction on lifelong user histories."""

from importlib.metadata import version

from rellax import ops
from rellax.errors import InputError
from rellax.patch import (
    CFLoRAConfig,
    SoftPromptConfig,
    answer_logits,
    load_adapter,
    patch_model,
    save_adapter,
    unpatch_model,
)

__version__ = version("rellax")

__all__ = [
    "CFLoRAConfig",
    "InputError",
    "SoftPromptConfig",
    "__version__",
    "answer_logits",
    "load_adapter",
    "ops",
    "patch_model",
    "save_adapter",
    "unpatch_model",
]
