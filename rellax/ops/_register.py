"""The only place where an operator is defined and its backend chosen.

An operator hands over its implementations; which of them runs is decided per call, by the device of the
tensors and the environment variable ``RELLAX_BACKEND``:

========== =====================================================================================
unset      CUDA: Triton; CPU: C++; anywhere else, and where an operator has no such kernel: PyTorch
reference  plain PyTorch everywhere
cpp        C++, and an error where it cannot run
triton     Triton, and an error where it cannot run (a CPU needs ``TRITON_INTERPRET=1``)
========== =====================================================================================
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rellax.errors import InputError
from rellax.ops._eager import Operator

BACKENDS = ("reference", "cpp", "triton")
_PROCESS = os.getpid()


@functools.cache
def extension_built() -> bool:
    """Whether the C++ extension ``rellax._C`` is there; says once what to do where it is not."""
    built = importlib.util.find_spec("rellax._C") is not None
    if not built:
        warnings.warn(
            "rellax: the C++ extension is not built, so PyTorch operators run on the CPU; "
            "`pip install -e .` in the checkout builds it",
            stacklevel=3,
        )
    return built


@functools.cache
def extension() -> Any:
    """The C++ extension, on PyTorch's threads; in a forked process, where they are missing, on its caller's.

    Imported by its name, as its package imports the operators.
    """
    module = importlib.import_module("rellax._C")
    module.set_parallel_region(_openmp_entry() if os.getpid() == _PROCESS else 0)
    return module


def _openmp_entry() -> int:
    """The address of GOMP_parallel in the OpenMP runtime that PyTorch runs on, 0 where there is none.

    As the linker finds it for PyTorch: in what the process has loaded first (``LD_PRELOAD``), then beside it.
    """
    for library in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        with contextlib.suppress(OSError, AttributeError):
            return ctypes.cast(ctypes.CDLL(library).GOMP_parallel, ctypes.c_void_p).value or 0
    return 0


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_of_no_triton() -> None:
    warnings.warn(
        "rellax: Triton is not installed, so PyTorch operators run on the GPU; `pip install triton` adds it",
        stacklevel=3,
    )


_operators: dict[str, Backends] = {}


def backend_of(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The backend that the operator ``rellax::<name>`` runs on: :meth:`Backends.backend`."""
    return _operators[name].backend(device, dtype)


class Backends:
    """The implementations of one operator, all with the same signature.

    Args:
        name: the operator's name, for messages.
        reference: plain PyTorch.
        cpp: calls ``rellax._C``; None where the operator has no C++ kernel.
        cpp_dtypes: the dtypes of the first tensor that `cpp` takes; None is any.
        triton: "module:function", imported at first use; None where the operator has no Triton kernel.
        triton_dtypes: the dtypes of the first tensor that `triton` takes; None is any.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        *,
        cpp: Callable[..., Any] | None = None,
        cpp_dtypes: tuple[torch.dtype, ...] | None = None,
        triton: str | None = None,
        triton_dtypes: tuple[torch.dtype, ...] | None = None,
    ) -> None:
        self.name = name
        self._reference = reference
        self._cpp = cpp
        self._cpp_dtypes = cpp_dtypes
        self._triton = triton
        self._triton_dtypes = triton_dtypes

    def backend(self, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
        """The name of the backend that runs for a first tensor of that device and dtype.

        Raises:
            InputError: ``RELLAX_BACKEND`` is unknown, or names a backend that cannot run here.
        """
        wanted = os.environ.get("RELLAX_BACKEND", "")
        if wanted == "":
            if device.type == "cuda" and self._triton_takes(dtype):
                if triton_installed():
                    return "triton"
                _warn_of_no_triton()
            if device.type == "cpu" and self._cpp_takes(dtype) and extension_built():
                return "cpp"
            return "reference"
        if wanted not in BACKENDS:
            raise InputError(f"RELLAX_BACKEND: expected one of {', '.join(BACKENDS)}, got {wanted!r}")
        if reason := self._why_not(wanted, device, dtype):
            raise InputError(f"RELLAX_BACKEND={wanted}: {self.name} cannot run on it, {reason}")
        return wanted

    def _cpp_takes(self, dtype: torch.dtype) -> bool:
        return self._cpp is not None and (self._cpp_dtypes is None or dtype in self._cpp_dtypes)

    def _triton_takes(self, dtype: torch.dtype) -> bool:
        return self._triton is not None and (self._triton_dtypes is None or dtype in self._triton_dtypes)

    def _why_not(self, backend: str, device: torch.device, dtype: torch.dtype) -> str:
        if backend == "cpp":
            if self._cpp is None:
                return "it has no C++ kernel"
            if device.type != "cpu":
                return f"its tensors are on {device}"
            if not self._cpp_takes(dtype):
                return f"its C++ kernel does not take {dtype}"
            return "" if extension_built() else "the extension is not built"
        if backend == "triton":
            if self._triton is None:
                return "it has no Triton kernel"
            if not triton_installed():
                return "Triton is not installed"
            if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
                return f"its tensors are on {device}"
            if not self._triton_takes(dtype):
                return f"its Triton kernel does not take {dtype}"
        return ""

    def __call__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Callable[..., Any]:
        """The implementation that runs for a first tensor of that device and dtype."""
        backend = self.backend(device, dtype)
        if backend == "reference":
            return self._reference
        if backend == "cpp":
            assert self._cpp is not None
            return self._cpp
        assert self._triton is not None
        return _load(self._triton)


def operator(
    name: str,
    reference: Callable[..., Any],
    *,
    cpp: Callable[..., Any] | None = None,
    cpp_dtypes: tuple[torch.dtype, ...] | None = None,
    triton: str | None = None,
    triton_dtypes: tuple[torch.dtype, ...] | None = None,
    check: Callable[..., None] | None = None,
) -> Operator:
    """Define ``rellax::<name>`` with `reference`'s signature as its schema.

    The operator's first argument, a tensor or a list of tensors, decides where it runs. Autocast is off
    inside, on every backend alike: which dtype a product runs in is part of the operator's contract.

    Args:
        check: takes the arguments before an implementation does, and raises where their values do not fit; in
            compiled graphs too, but on a CPU alone: no GPU is made to wait for it.
        name, reference, cpp, cpp_dtypes, triton, triton_dtypes: as in :class:`Backends`.
    """
    backends = _operators[name] = Backends(
        name, reference, cpp=cpp, cpp_dtypes=cpp_dtypes, triton=triton, triton_dtypes=triton_dtypes
    )

    def run(*args: Any) -> Any:
        first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
        device = first.device
        implementation = backends(device, first.dtype)
        if check is not None and device.type == "cpu":
            check(*args)
        if not torch.is_autocast_enabled(device.type):
            return implementation(*args)
        with torch.autocast(device.type, enabled=False):
            return implementation(*args)

    schema = torch.library.infer_schema(reference, mutates_args=())
    return Operator(torch.library.custom_op(f"rellax::{name}", run, mutates_args=(), schema=schema), run)


@functools.cache
def _load(path: str) -> Callable[..., Any]:
    module, function = path.split(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return loaded
