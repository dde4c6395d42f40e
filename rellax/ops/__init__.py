"""Operators: one contract each, whatever the backend."""

from rellax.ops.cflora import cflora_linear

__all__ = ["cflora_linear"]
