"""Hand-made events of a replay and of two decisions; shared by the tests of profiles."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from timeline import Event  # noqa: E402


def event(cat: str, name: str, ts: float, dur: float, **more: Any) -> Event:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": {}, **more}


#: One replay: two fills before the graph, then a copy in, two kernels that overlap, one 6 us later, and a copy out.
REPLAY = [
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    event("cuda_runtime", "cudaGraphLaunch", 90, 5, args={"correlation": 7}),
    event("cuda_runtime", "cudaLaunchKernel", 50, 5, args={"correlation": 6}),
    event("kernel", "FillFunctor", 60, 1, args={"correlation": 6}),
    event("gpu_user_annotation", "decision", 50, 90),
    event("kernel", "join_kernel", 120, 4, args={"correlation": 7}),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 100, 2, args={"correlation": 7}),
    event("kernel", "attend_kernel", 103, 10, args={"correlation": 7}),
    event("kernel", "few_rows_kernel", 110, 4, args={"correlation": 7}),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 124, 1, args={"correlation": 7}),
]
#: Two decisions of 100 us; in the first, stages of 30 and 60, the second of which has two layers, and 10 in none.
HOST = [
    event("user_annotation", "ProfilerStep#1", 0, 200),
    event("user_annotation", "decision", 0, 100),
    event("user_annotation", "encode", 0, 30),
    event("cpu_op", "aten::linear", 5, 20),
    event("cpu_op", "aten::addmm", 6, 15),
    event("cpu_op", "aten::gelu", 25, 5),
    event("user_annotation", "codes", 35, 60),
    event("user_annotation", "layer 0", 40, 20),
    event("cpu_op", "aten::mm", 40, 20),
    event("user_annotation", "layer 11", 60, 30),
    event("cpu_op", "aten::mm", 62, 8),
    event("user_annotation", "decision", 100, 100),
    event("cpu_op", "elsewhere", 10, 500, tid=2),
    event("kernel", "attend_kernel", 10, 500),
]
