"""Decisions to look at with a profiler: under Nsight, under CUPTI for gaps in a graph's replay, or on a CPU as a table.

``bench/profile.sh`` runs it under Nsight; docs/profiling.md reads what comes out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timeline import Event, markdown, read_ranges, report_gaps
from torch.profiler import ProfilerActivity, profile, schedule

from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.errors import FlexLAMError, InputError
from flexlam_fast.policy import DTYPES, Policy
from flexlam_fast.ranges import NVTX, OFF, TORCH, set_ranges, span

WARM_UPS = 5

Act = Callable[[], object]


def record(act: Act, calls: int, device: torch.device, keep: Path | None = None) -> list[Event]:
    """Record ``calls`` calls after one to warm up on: the events of a chrome trace, which ``keep`` is a file for."""
    on_device = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with profile(activities=activities, schedule=schedule(wait=0, warmup=1, active=calls, repeat=1)) as profiler:
        for _ in range(1 + calls):
            act()
            if on_device:
                torch.cuda.synchronize(device)
            profiler.step()
    with tempfile.TemporaryDirectory() as folder:
        path = keep or Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def timed(act: Act, calls: int) -> float:
    """Milliseconds per call; a decision ends with its action on the host, so there is nothing to wait for."""
    start = time.perf_counter()
    for _ in range(calls):
        act()
    return 1e3 * (time.perf_counter() - start) / calls


def under_nsight(act: Act, calls: int, level: int) -> None:
    """Make ``calls`` calls with ranges on, and let a profiler that waits for it see these alone."""
    set_ranges(level, NVTX)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    try:
        ms = timed(act, calls)
        torch.cuda.synchronize()
    finally:
        torch.cuda.profiler.stop()
        set_ranges(OFF)
    print(f"{calls} decisions between start and stop, {ms:.3f} ms each, under whatever looked on")


def as_table(act: Act, calls: int, level: int, keep: Path | None) -> None:
    """Print where the milliseconds of a decision go."""
    alone = timed(act, calls)
    set_ranges(level, TORCH)
    try:
        events = record(act, calls, torch.device("cpu"), keep)
    finally:
        set_ranges(OFF)
    print(
        f"{torch.get_num_threads()} threads, {alone:.1f} ms a decision alone; under torch.profiler, mean of {calls}:\n"
    )
    print(markdown(read_ranges(events), calls))


def build(options: argparse.Namespace) -> tuple[Policy, Act]:
    """Build a policy with a full window, and its next decision, which is always the same call."""
    try:
        device = torch.device(options.device)
    except RuntimeError:
        raise InputError(f"device: expected cpu or cuda, got {options.device!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: expected a CUDA device that torch sees for {options.device!r}, got none")
    cfg = FlexLAMConfig.preset(options.preset)
    policy = Policy(cfg, device=device, dtype=DTYPES[options.dtype], backend=options.backend, graphs=options.graphs)
    policy.reset(options.batch)
    size = (options.batch, cfg.frame, cfg.frame, cfg.channels)
    frames = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def act() -> None:
        with span("decision"):
            policy.act(frames, options.budget)

    policy.act(frames, options.budget)  # a budget out of bounds is told before the window is filled
    for _ in range(cfg.sequence.window):
        policy.act(frames, 1)
    timed(act, WARM_UPS)
    return policy, act


def parser() -> argparse.ArgumentParser:
    """Build the options; ``--help`` lists them."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--preset", default="dmlab", help="which configuration, with random weights")
    options.add_argument("--budget", type=int, default=16, help="codes per decision")
    options.add_argument("--batch", type=int, default=1, help="sessions that act at once")
    options.add_argument("--decisions", type=int, default=10, help="decisions that are profiled")
    options.add_argument("--device", default=found, help="cpu or cuda")
    options.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES), help="of weights and pages")
    options.add_argument("--backend", default="auto", help="which code runs")
    options.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="replay CUDA graphs")
    options.add_argument("--level", type=int, default=1, help="ranges: 0 none, 1 stages, 2 also codes and layers")
    options.add_argument("--gaps", action="store_true", help="on a GPU: how busy the device is in one decision")
    options.add_argument("--most-gap-us", type=float, default=5.0, help="exit 1 on a larger gap in a graph's replay")
    options.add_argument("--trace", type=Path, help="keep the chrome trace of --gaps, or of a CPU, in this file")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run, and return the exit status: 1 is a gap too large, 2 what cannot be run."""
    options = parser().parse_args(arguments)
    try:
        if options.decisions < 1:
            raise InputError(f"decisions: expected at least 1, got {options.decisions}")
        set_ranges(options.level, TORCH)  # an unknown level is told before the policy is built
        set_ranges(OFF)
        policy, act = build(options)
        print(f"{policy.describe()}\n{options.preset}, k={options.budget}, batch {options.batch}")
        if policy.device.type == "cpu":
            as_table(act, options.decisions, options.level, options.trace)
        elif options.gaps:
            events = record(act, 1, policy.device, options.trace)
            text, fine = report_gaps(events, policy.graphs, options.most_gap_us)
            print(text)
            return 0 if fine else 1
        else:
            under_nsight(act, options.decisions, options.level)
    except FlexLAMError as error:
        print(f"profile_decide: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
