"""Which code runs an operation, decided once, at construction, and never by an environment variable.

``reference`` is plain PyTorch on any device, ``native`` is C++ and CUDA (``csrc/``), ``triton`` is ``kernels/``. A
backend asked for by name works or raises; only ``auto`` chooses.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from typing import NamedTuple

import torch

from flexlam_fast.checks import describe
from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.values import shown

AUTO, REFERENCE, TRITON, NATIVE = "auto", "reference", "triton", "native"
NAMES = (AUTO, REFERENCE, TRITON, NATIVE)
#: What weights may be, by the names that command lines take.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BOTTLENECK = "runs the bottleneck and, for models it takes, blocks of codes; the rest is PyTorch in this version"
_CODES = "runs bottleneck and sequence model, in bf16 with AMX the encoder too; the rest is PyTorch in this version"
_DECISION = "runs bottleneck, sequence model and translator; encoder and decoder are PyTorch in this version"


class BackendStatus(NamedTuple):
    """Whether one backend can run here, and in one sentence why or why not."""

    name: str
    available: bool
    reason: str


class BackendChoice(NamedTuple):
    """The backend that was taken and the sentence that says why."""

    name: str
    reason: str


def probe(device: torch.device | str = "cpu") -> tuple[BackendStatus, ...]:
    """Return the status of every backend for tensors on ``device``, fastest first. Does not import triton."""
    reference = BackendStatus(REFERENCE, True, "plain PyTorch, runs on every device that torch runs on")
    kind = torch.device(device).type
    # On a GPU both compiled backends move the same bytes; Triton first because it also fuses the projection.
    return (_triton(kind), _native(kind), reference) if kind == "cuda" else (_native(kind), reference, _triton(kind))


def _native(kind: str) -> BackendStatus:
    if kind not in ("cpu", "cuda"):
        return BackendStatus(NATIVE, False, f"it has code for cpu and cuda, none for {kind}")
    if importlib.util.find_spec("flexlam_fast._C") is None:
        return BackendStatus(NATIVE, False, "the extension was not built (flexlam-fast doctor says what is missing)")
    try:
        info = importlib.import_module("flexlam_fast._C").build_info()
    except ImportError as error:
        return BackendStatus(NATIVE, False, f"the extension is there but does not load: {error}")
    if kind == "cpu":
        return BackendStatus(NATIVE, True, f"C++ for {info['variants'][0]} {_CODES}")
    if not info["cuda"]:
        return BackendStatus(NATIVE, False, "the extension was built without CUDA, because nvcc was not there")
    if not torch.cuda.is_available():
        return BackendStatus(NATIVE, False, "torch sees no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return BackendStatus(NATIVE, False, f"it has code for sm_80 and later, this is {torch.cuda.get_device_name()}")
    how = "machine code for sm_90a" if (major, minor) == (9, 0) else f"PTX, compiled here for sm_{major}{minor}"
    return BackendStatus(NATIVE, True, f"CUDA, {how}, {_BOTTLENECK}")


def _triton(kind: str) -> BackendStatus:
    if importlib.util.find_spec("triton") is None:
        return BackendStatus(TRITON, False, 'triton is not installed: pip install "flexlam-fast[gpu]"')
    if importlib.util.find_spec("flexlam_fast.kernels") is None:
        return BackendStatus(TRITON, False, "flexlam_fast.kernels is missing: install the package, pip install -e .")
    if kind == "cuda":
        there = torch.cuda.is_available()
        return BackendStatus(TRITON, there, f"Triton {_DECISION}" if there else "torch sees no CUDA device")
    loaded = sys.modules.get("triton")
    if kind == "cpu" and loaded is not None and loaded.knobs.runtime.interpret:
        return BackendStatus(TRITON, True, "Triton's interpreter, for tests: thousands of times slower than a GPU")
    return BackendStatus(TRITON, False, f"Triton compiles for GPUs, not for {kind}")


def check_weights_dtype(name: str, dtype: object) -> None:
    """Check that weights can have a dtype.

    Raises:
        InputError: ``dtype: expected float32, bfloat16, float16, got torch.int8``.
    """
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES.values():
        raise InputError(f"{name}: expected {', '.join(DTYPES)}, got {shown(dtype)}")


def named(backend: object) -> str:
    """Return the backend that a call asks for by name; None is ``auto``.

    Raises:
        BackendError: something else than a name.
    """
    if backend is None:
        return AUTO
    if isinstance(backend, str):
        return backend
    raise BackendError(f"backend: expected one of {', '.join(NAMES)}, got {describe(backend)}")


def choose(name: str, device: torch.device | str) -> BackendChoice:
    """Return the backend for ``name`` on ``device``.

    Args:
        name: ``auto`` for the fastest that works there, or the name of one, which is then taken or refused.
        device: where the tensors will live.

    Raises:
        BackendError: there is no such backend, or it was asked for by name and cannot run here.
    """
    name, statuses = named(name), probe(device)
    if name == AUTO:
        taken = next(status for status in statuses if status.available)
        others = "; ".join(f"{s.name}: {s.reason}" for s in statuses if not s.available)
        without = f" (without {others})" if others else ""
        return BackendChoice(taken.name, f"the fastest on {torch.device(device)}: {taken.reason}{without}")
    for status in statuses:
        if status.name == name:
            if not status.available:
                raise BackendError(f"backend: expected one that runs here, got {name!r}: {status.reason}")
            return BackendChoice(name, f"asked for by name: {status.reason}")
    raise BackendError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")


def find_device(name: str | torch.device) -> torch.device:
    """Return the device that ``name`` means, if it is here; ``auto`` is a GPU where there is one.

    Raises:
        InputError: for a name torch does not know, or a device this machine lacks.
    """
    if isinstance(name, str) and name == AUTO:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = f"device: expected one that this machine has, got {shown(name)}"
    named_one = isinstance(name, str) and re.fullmatch(r"cpu(:0)?|(?!cpu|meta)[a-z]+(:\d{1,3})?", name)
    if not named_one and not isinstance(name, torch.device):
        raise InputError(wanted)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # of many types: "not compiled with CUDA" is an assertion, a lacking plugin an import
        raise InputError(f"{wanted} ({(str(error).strip() or type(error).__name__).splitlines()[0]})") from error
    return device
