"""Triton's interpreter, mended where the tests need it."""

from __future__ import annotations

from typing import Any


def mend_interpreter() -> None:
    """Make loop bounds work in the interpreter of Triton 3.6 to 3.8: it calls int() on arrays of one
    element, which numpy refuses from 2.4 on (https://github.com/triton-lang/triton/issues/9171)."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = mended
