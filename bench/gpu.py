"""What a GPU machine can say, in stages of at most nine minutes, the most valuable first (``make gpu``).

Uses the Python that runs it, installs nothing, needs no network. What fails, or lacks a package, does not keep the next
from running; the exit status tells in the end. Results merge by row id into ``<device>.json``, also over several calls
and machines. With ``--dry-run`` nothing needs a GPU: every command is printed, what it imports is imported with the
packages of the GPU image only, and the tests and benches that would run are listed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TESTS, KERNELS, LINK = ROOT / "tests", ROOT / "kernels", ROOT / "flexlam_fast" / "kernels"
#: A call on the machine ends after ten minutes; a stage that takes longer is ended, with what it has written kept.
LIMIT = 540
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
#: Compiling is most of what a GPU test does, and one process each compiles for itself.
PROCESSES = ("-n", "12", "--dist", "worksteal")
SMOKE = ("graphs", "prepared", "engine_cuda", "ways", "step", *(
    f"ops_{op}" for op in ("linear", "paged", "sampling", "translate", "attention", "draws")
))  # fmt: skip
#: Tests that speak of CUDA and run on a CPU.
ON_A_CPU = ("cli_numbers", "doctor", "evaluate_rollout", "profile", "train")
#: What the tests and benches can use and the GPU image has not.
LACKING = ("vector_quantize_pytorch", "einx", "frozendict", "nvtx")
#: Without torch's allocator, which would hide what is read or written beyond a tensor.
SANITIZED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


class Command(NamedTuple):
    """One program: ``args`` of Python, or of ``tool`` in front of it; ``needs`` packages beside torch and pytest."""

    args: tuple[str, ...]
    needs: tuple[str, ...] = ()
    tool: tuple[str, ...] = ()
    env: dict[str, str] | None = None
    cwd: Path = ROOT

    def words(self) -> list[str]:
        """The command line."""
        return [*self.tool, sys.executable, *self.args]


class Stage(NamedTuple):
    """``seconds`` is what it is expected to take, which no GPU has confirmed yet."""

    name: str
    seconds: int
    what: str
    commands: tuple[Command, ...]


def bench(*args: str, needs: tuple[str, ...] = ()) -> Command:
    """Benches whose rows go into the results file."""
    return Command((*PYTEST, *args, "--benchmark-only", "--write-results"), ("pytest_benchmark", *needs))


def files_of(*names: str, needs: tuple[str, ...] = ("hypothesis",), also: tuple[str, ...] = PROCESSES) -> Command:
    """Test files by the middle of their names."""
    return Command((*PYTEST, *also, *(f"tests/test_{name}.py" for name in names)), needs)


def parity(way: str, dtype: str, decisions: int) -> Command:
    """Whole decisions of ``dmlab`` against the reference."""
    sizes = ("--preset", "dmlab", "--device", "cuda", "--batch", "8", "--decisions", str(decisions))
    return Command(("bench/parity.py", *sizes, "--way", way, "--dtype", dtype))


def sanitized(tool: str, files: tuple[str, ...], which: str, kernels: Iterable[str]) -> Command:
    """Some tests under a tool of compute-sanitizer, which looks at kernels whose names hold one of ``kernels``."""
    words = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    words += [word for name in kernels for word in ("--kernel-name", f"kernel_substring={name}")]
    words += ["--report-api-errors", "no"] if tool == "memcheck" else []
    run = files_of(*files, also=("-x", "-k", which))
    return run._replace(tool=tuple(words), env=SANITIZED)


def kernel_names() -> list[str]:
    """Our Triton kernels, and FSQ's two in CUDA."""
    texts = [path.read_text(encoding="utf-8") for path in KERNELS.glob("*.py")]
    found = {name for text in texts for name in re.findall(r"^def (\w+_kernel)\(", text, re.M)}
    return [*sorted(found), "forward_kernel", "backward_kernel"]


def gpu_tests() -> list[str]:
    """The test files that do something else where there is a GPU: they, or a helper they import, name the device."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in TESTS.glob("*.py")}
    about = {name for name, text in texts.items() if re.search(r"[\"']cuda[\"']|mark\.gpu", text)} - {"conftest"}
    while True:
        users = {n for n, text in texts.items() if about & set(re.findall(r"^(?:from|import) (\w+)", text, re.M))}
        if users <= about:
            break
        about |= users
    names = sorted(name.removeprefix("test_") for name in about if name.startswith("test_"))
    return [name for name in names if name not in ON_A_CPU]


def stages() -> list[Stage]:
    """All of them, in the order in which they are worth a call."""
    rounds = ("--rounds", "30", "--compile-seconds", "0")
    one, blocks = ("--device", "cuda", "--batch", "1"), ("bench/blocks.py", "--blocks")
    ncu = ("ncu", "--clock-control", "none", "--set", "full", "--force-overwrite")
    ours = kernel_names()
    regex = "regex:^(" + "|".join(ours[:-2]) + ")$"
    graph = ("--profile-from-start", "off", "--graph-profiling", "node", "--launch-count", "60")
    qwen = ("transformers",)
    rest = [name for name in gpu_tests() if name not in SMOKE]
    decide = "bench/test_decide.py"
    exact = "(cuda and (edge or budget or lengths_are)) or (fused_is and not dtype2)"
    small = ("fsq_backends", "fsq_contracts", "ways")
    training, block = ("ops_rows", "ops_rotary", "ops_loss", "ops_flow_loss"), ["block_kernel"]
    found = [
        Stage("headline", 480, "build, smoke tests, a block of codes, a decision of one session, profiles", (
            # from elsewhere: a setuptools before 77 refuses the licence in pyproject.toml, which it need not read
            Command((str(ROOT / "setup.py"), "--quiet", "build_ext", "--build-lib", str(ROOT)), cwd=ROOT / "build"),
            files_of(*SMOKE, also=(*PROCESSES, "--maxfail=40")),
            bench("bench/test_codes.py", *rounds, needs=qwen),
            bench(decide, "-k", "dmlab/b1/", *rounds, needs=qwen),
            Command((*blocks, "1"), tool=(*ncu, "-k", "regex:block_kernel", "-c", "1", "-o", "{out}/block")),
            Command(("bench/profile_decide.py", *one, "--budget", "2", "--decisions", "1", "--level", "0"),
                    tool=(*ncu, *graph, "-k", regex, "-o", "{out}/kernels")),
            Command(("bench/profile_decide.py", *one, "--budget", "16", "--gaps", "--most-gap-us", "5")),
        )),
        Stage("parity", 420, "decisions of dmlab against the reference, both ways; cost as windows slide", (
            parity("fused", "bfloat16", 300), parity("fused", "float32", 40), parity("fused", "float16", 40),
            parity("cuda", "bfloat16", 40), Command((*blocks, "2000")), Command((*blocks, "200", "--batch", "8")),
            Command(("bench/steady.py", "--preset", "dmlab", "--device", "cuda", "--dtype", "bfloat16")),
        )),
        Stage("train", 420, "training steps beside PyTorch's and its compiler's, the bottleneck, attention", (
            bench("bench/test_train.py", "bench/test_bottleneck.py", "bench/test_attention_train.py", "--rounds", "20",
                  "--compile-seconds", "30"),
        )),
        Stage("tests", 480, "all other tests that use a GPU where there is one", (files_of(*rest),)),
        Stage("batch", 480, "decisions of 8, 64 and 256 sessions beside the compiled peer", (
            bench(decide, "-k", "dmlab/b8/ or dmlab/b64/ or dmlab/b256/", "--rounds", "20", "--compile-seconds", "20",
                  needs=qwen),
        )),
        Stage("rows", 480, "every other bench: single ops, frames, loaders, generate", (
            bench("bench/test_rows.py", "bench/test_sequence_ops.py", "bench/test_frames.py", "bench/test_loader.py",
                  "bench/test_generate.py", "--rounds", "10", "--compile-seconds", "10", needs=qwen),
        )),
    ]  # fmt: skip
    cases = [(tool, small, exact, ours) for tool in ("memcheck", "racecheck")]
    cases += [(tool, training, "within and float32 and triton", ours) for tool in ("memcheck", "racecheck")]
    cases += [(tool, ("engine_cuda",), "small_model", block) for tool in ("memcheck", "racecheck", "synccheck")]
    return found + [
        Stage(f"sanitizer-{i}", 420, f"{tool} on {', '.join(files)}", (sanitized(tool, files, which, names),))
        for i, (tool, files, which, names) in enumerate(cases, 1)
    ]


def lacking(command: Command) -> str:
    """What a command needs and this machine has not; empty if nothing."""
    missing = [name for name in command.needs if importlib.util.find_spec(name) is None]
    if PROCESSES[0] in command.args and importlib.util.find_spec("xdist") is None:
        missing.append("pytest-xdist")
    return ", ".join(missing)


def tool_of(command: Command) -> str:
    """The path of the tool in front of a command; empty if it is not there."""
    name = command.tool[0]
    beside = Path("/usr/local/cuda/bin") / name
    return shutil.which(name) or (str(beside) if beside.exists() else "")


def run(stage: Stage, out: Path) -> list[str]:
    """Run a stage's commands one after another; what went wrong, in one line each."""
    wrong, began = [], time.monotonic()
    for number, command in enumerate(stage.commands, 1):
        label = f"{stage.name}, command {number} of {len(stage.commands)}"
        missing = lacking(command)
        if command.tool and not tool_of(command):
            missing = ", ".join(filter(None, [missing, command.tool[0]]))
        if missing:
            wrong.append(f"{label}: left out, {missing} is not here")
            continue
        left = LIMIT - (time.monotonic() - began)
        if left < 10:
            wrong.append(f"{label}: left out, the stage's {LIMIT} s were over")
            continue
        words = [word.replace("{out}", str(out)) for word in command.words()]
        if command.tool:
            words[0] = tool_of(command)
        if "--write-results" in words:
            words += ["--results-dir", str(out)]
        print(f"== {shlex.join(words)}", flush=True)
        start = time.monotonic()
        # a session of its own, so that what a tool started ends with it and is not timed beside the next stage
        program = subprocess.Popen(words, cwd=command.cwd, env=environment(command.env), start_new_session=True)
        try:
            if status := program.wait(left):
                wrong.append(f"{label}: ended with {status}")
        except subprocess.TimeoutExpired:
            wrong.append(f"{label}: ended after {left:.0f} s, the rest of the stage's {LIMIT}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()
        print(f"== took {time.monotonic() - start:.0f} s", flush=True)
    return wrong


def environment(more: dict[str, str] | None) -> dict[str, str]:
    """That of a command: our modules are found without an installation."""
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep + path if path else ''}", **(more or {})}


def rehearse(stage: Stage) -> list[str]:
    """Print what a stage would do, import what it imports, list what it would test; what went wrong."""
    wrong = []
    for command in stage.commands:
        print(f"$ {shlex.join(command.words())}", flush=True)
        if "pytest" in command.args:
            options = {"-q", *PROCESSES, "--benchmark-only", "--write-results"}
            args = [word for word in command.args[2:] if word not in options]
            words = ["-m", "pytest", "--collect-only", "-q", "-p", "dry_gpu", *args]
        elif command.args[0].endswith("setup.py"):
            words = [command.args[0], "--help"]
        else:
            words = ["-c", "import dry_gpu, runpy, sys; sys.argv = sys.argv[1:]; "
                     "runpy.run_path(sys.argv[0], run_name='__main__')", command.args[0], "--help"]  # fmt: skip
        env = environment(None)
        env["PYTHONPATH"] = f"{ROOT / 'bench'}{os.pathsep}{env['PYTHONPATH']}"
        whole = [sys.executable, *words]
        done = subprocess.run(whole, cwd=command.cwd, env=env, capture_output=True, encoding="utf-8", check=False)
        lines = done.stdout.splitlines()
        ids = [line for line in lines if "::" in line]
        print("\n".join(ids) if ids else "    (no tests; its --help was printed without an error)", flush=True)
        skipped = [line for line in lines if line.startswith("SKIPPED")]
        print("\n".join(skipped), end="\n" if skipped else "", flush=True)
        absent = [name for name in command.needs if name in LACKING]
        if absent:
            wrong.append(f"{stage.name}: {shlex.join(command.args)} would be left out for {', '.join(absent)}")
        # 5: nothing collected, which is right only where all of it needs what is not there
        if done.returncode not in ((0, 5) if skipped else (0,)):
            wrong.append(f"{stage.name}: {shlex.join(command.args)} ended with {done.returncode}: {tail(done)}")
    return wrong


def tail(done: subprocess.CompletedProcess[str]) -> str:
    """The last lines of what a command said."""
    return "\n".join([*done.stdout.splitlines()[-15:], *done.stderr.splitlines()[-15:]])


def listing(found: Iterable[Stage]) -> Iterator[str]:
    """Stages, how long each is expected to take, and what it does."""
    for stage in found:
        yield f"{stage.name:<12} {stage.seconds / 60:>4.1f} min  {stage.what}"
    others = [path.stem.removeprefix("test_") for path in sorted(TESTS.glob("test_*.py"))]
    left = [name for name in others if name not in gpu_tests()]
    yield f"left out: {len(left)} test files that need no GPU ({', '.join(left)})"


def device() -> str:
    """The GPU's name; empty if torch sees none."""
    ask = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name(0))"]
    return subprocess.run(ask, capture_output=True, encoding="utf-8", check=False).stdout.strip()


def main() -> int:
    """Run, rehearse or list."""
    known = {stage.name: stage for stage in stages()}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", help=f"which, of {', '.join(known)}; none: a list of them")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="where results and profiles go")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, without a GPU")
    options = parser.parse_args()
    unknown = [name for name in options.stages if name not in known]
    if unknown:
        parser.error(f"stages: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    if not options.stages and not options.dry_run:
        print("\n".join(listing(known.values())))
        return 0
    if not options.dry_run and not device():
        print("make gpu: expected a Python whose torch sees a CUDA device, got none.", file=sys.stderr)
        return 1
    linked = not LINK.exists()
    if linked:  # the kernels under the name that an installation gives them
        LINK.symlink_to("../kernels")
    for folder in (options.out, ROOT / "build"):
        folder.mkdir(parents=True, exist_ok=True)
    wrong = []
    try:
        for name in options.stages or known:
            print(f"== {name}: about {known[name].seconds} s", flush=True)
            wrong += rehearse(known[name]) if options.dry_run else run(known[name], options.out.resolve())
    finally:
        if linked:
            LINK.unlink()
    print("\n".join(["== these went wrong:", *wrong] if wrong else ["== all went well"]), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
