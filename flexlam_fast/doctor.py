"""``flexlam-fast doctor``: what this machine has, which backend ``auto`` takes, and why each other one is not there."""

from __future__ import annotations

import json as json_text
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

import flexlam_fast
from flexlam_fast.backend import AUTO, BackendChoice, BackendStatus, choose, probe
from flexlam_fast.checkpoint import load_checkpoint
from flexlam_fast.errors import CheckpointError
from flexlam_fast.ops.attention import available_attention

ASSETS = Path(__file__).parent / "assets"
PACKAGES = (
    ("av", "data"),
    ("gymnasium", "data"),
    ("pillow", "data"),
    ("pyarrow", "data"),
    ("tyro", "data"),
    ("vizdoom", "data"),
    ("tensorboard", "train"),
    ("matplotlib", "demo"),
    ("torchmetrics", "demo"),
    ("triton", "gpu"),
    ("transformers", "test"),
    ("vector-quantize-pytorch", "test"),
)
TOOLS = (("C++ compiler", ("c++", "g++", "clang++")), ("cmake", ("cmake",)), ("ninja", ("ninja",)), ("nvcc", ("nvcc",)))


class Fact(NamedTuple):
    """One thing this machine has or lacks: ``value`` is a version, a size, a path, or the sentence why not."""

    name: str
    found: bool
    value: str


class Processor(NamedTuple):
    """The CPU: cores this process may use, threads torch uses, instruction sets or the sentence why unknown."""

    model: str
    cores: int
    threads: int
    instructions: tuple[str, ...]
    note: str


class Report(NamedTuple):
    """Everything ``doctor`` knows."""

    versions: tuple[Fact, ...]
    cpu: Processor
    gpus: tuple[Fact, ...]
    extension: Fact
    tools: tuple[Fact, ...]
    packages: tuple[Fact, ...]
    backends: tuple[BackendStatus, ...]
    auto: BackendChoice
    attention: tuple[BackendStatus, ...]
    checkpoints: tuple[Fact, ...]


def collect_report() -> Report:
    """Look at this machine; takes about a second, and reads each shipped checkpoint in full to verify it."""
    extension, instructions = _extension()
    versions = (
        Fact("flexlam_fast", True, flexlam_fast.__version__),
        Fact("python", True, platform.python_version()),
        Fact("torch", True, str(torch.__version__)),
        Fact("system", True, platform.platform()),
    )
    note = "" if extension.found else f"instruction sets unknown: {extension.value}"
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Report(
        versions=versions,
        cpu=Processor(_cpu_model(), cores, torch.get_num_threads(), instructions, note),
        gpus=tuple(_gpus()),
        extension=extension,
        tools=tuple(_tool(name, programs) for name, programs in TOOLS),
        packages=tuple(_package(name, extra) for name, extra in PACKAGES),
        backends=probe(device),
        auto=choose(AUTO, device),
        attention=available_attention(device, torch.bfloat16 if device == "cuda" else torch.float32, 64),
        checkpoints=tuple(_checkpoints()),
    )


def doctor(json: bool = False) -> None:
    """Print the report as a table, or as JSON with ``json``."""
    report = collect_report()
    print(json_text.dumps(_plain(report), indent=2) if json else format_report(report))


def format_report(report: Report) -> str:
    """Lay the report out as text, one section after the other."""
    cpu = report.cpu
    sections = [
        ("Versions", [(fact.name, fact.value) for fact in report.versions]),
        (
            "CPU",
            [
                ("model", cpu.model),
                ("cores, threads", f"{cpu.cores} cores, torch uses {cpu.threads} threads"),
                ("instructions", ", ".join(cpu.instructions) or cpu.note or "none of those looked for"),
            ],
        ),
        ("GPU", [(fact.name, fact.value) for fact in report.gpus]),
        ("Build tools", [(fact.name, fact.value) for fact in (report.extension, *report.tools)]),
        ("Optional packages", [(fact.name, fact.value) for fact in report.packages]),
        (
            "Backends",
            [*map(_told, report.backends), (AUTO, f"takes {report.auto.name}")],
        ),
        ("Attention", [_told(s._replace(name=f"encoder by {s.name}")) for s in report.attention]),
        ("Shipped checkpoints", [(fact.name, fact.value) for fact in report.checkpoints]),
    ]
    lines = []
    for title, rows in sections:
        lines += [title, *(f"  {name:<24} {value}" for name, value in rows)]
    return "\n".join(lines)


def _told(status: BackendStatus) -> tuple[str, str]:
    return status.name, f"{'available' if status.available else 'not available'}: {status.reason}"


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> Iterator[Fact]:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"is built for CUDA {built} and sees no device" if built else "is built without CUDA"
        yield Fact("none", False, f"torch {torch.__version__} {why}")
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        size = f"{card.total_memory / 2**30:.0f} GiB"
        yield Fact(f"cuda:{index}", True, f"{card.name}, compute capability {card.major}.{card.minor}, {size}")


def _extension() -> tuple[Fact, tuple[str, ...]]:
    """Return the state of ``flexlam_fast._C`` and the instruction sets that it sees."""
    try:
        from flexlam_fast import _C
    except ImportError as error:
        return Fact("extension", False, _why_no_extension(error)), ()
    info = _C.build_info()
    built = f"{info['compiler']}, C++ standard {info['cxx_standard']}, flags {info['flags']}"
    cuda = f"CUDA {info['cuda']}" if info["cuda"] else "without CUDA (no nvcc when it was built)"
    built += f", code for {', '.join(info['variants'])}"
    present = tuple(name for name, here in _C.cpu_features().items() if here)
    return Fact("extension", True, f"{built}, pybind11 {info['pybind11']}, {cuda}"), present


def _why_no_extension(error: ImportError) -> str:
    if not isinstance(error, ModuleNotFoundError) and "cannot import name" not in str(error):
        return f"the extension is there but does not load: {error}"
    missing = [name for name, programs in TOOLS[:2] if not any(map(shutil.which, programs))]
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append("Python.h")
    if missing:
        return f"the extension was not built, and this machine lacks {', '.join(missing)}"
    return "the extension was not built; every tool for it is here now, so install the package again"


def _tool(name: str, programs: tuple[str, ...]) -> Fact:
    path = next(filter(None, map(shutil.which, programs)), None)
    if path is None:
        return Fact(name, False, f"not found ({' or '.join(programs)} on the PATH)")
    try:
        how: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "errors": "replace", "timeout": 20}
        done = subprocess.run([path, "--version"], check=True, **how)
    except (OSError, subprocess.SubprocessError) as error:
        return Fact(name, False, f"{path} does not run: {error}")
    lines = [line.strip() for line in done.stdout.splitlines() if any(letter.isdigit() for letter in line)]
    told = next((line for line in lines if "release" in line), lines[0] if lines else "no version told")
    return Fact(name, True, told)


def _package(name: str, extra: str) -> Fact:
    try:
        return Fact(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Fact(name, False, f'not installed: pip install "flexlam-fast[{extra}]"')


def _checkpoints() -> Iterator[Fact]:
    found = False
    for folder in sorted(ASSETS.iterdir()) if ASSETS.is_dir() else ():
        if folder.is_dir() and (folder / "manifest.json").is_file():
            found = True
            try:
                tensors = load_checkpoint(folder).tensors.values()
            except CheckpointError as error:
                yield Fact(folder.name, False, str(error))
            else:
                yield Fact(folder.name, True, f"{sum(t.numel() for t in tensors):,} parameters, verified")
    if not found:
        yield Fact("none", False, "this installation carries no checkpoint")
