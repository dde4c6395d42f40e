"""Kernels and Hugging Face patches for LLM-based click-through-rate prediction on lifelong user histories."""

from importlib.metadata import PackageNotFoundError, version

from rellax import ops
from rellax.errors import InputError
from rellax.patch import (
    CFLoRAConfig,
    SoftPromptConfig,
    answer_logits,
    export_peft,
    load_adapter,
    load_published,
    patch_model,
    save_adapter,
    unpatch_model,
)

try:
    __version__ = version("rellax")
except PackageNotFoundError:  # a checkout that is on Python's path without being installed
    __version__ = "0+checkout"

__all__ = [
    "CFLoRAConfig",
    "InputError",
    "SoftPromptConfig",
    "__version__",
    "answer_logits",
    "export_peft",
    "load_adapter",
    "load_published",
    "ops",
    "patch_model",
    "save_adapter",
    "unpatch_model",
]
