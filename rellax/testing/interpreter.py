"""Triton's interpreter, mended where the tests need it."""

from __future__ import annotations

from typing import Any


def mend_interpreter() -> None:
    """Mend two faults in the interpreter of Triton 3.6 to 3.9.

    Loop bounds: it calls int() on arrays of one element, which numpy refuses from 2.4 on
    (https://github.com/triton-lang/triton/issues/9171). Masks: of a comparison of scalars that meets a block
    it makes integers, which from 3.9 on its own loads and stores refuse.
    """
    from triton.runtime import interpreter

    patch, splat = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_splat

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def create_splat(self: Any, *arguments: Any) -> Any:
        block, scalar = splat(self, *arguments), arguments[-1]
        block.data = block.data.astype(scalar.data.dtype)
        return block

    interpreter._patch_lang_tensor = mended
    interpreter.InterpreterBuilder.create_splat = create_splat
