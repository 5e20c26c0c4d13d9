"""``flexlam-fast doctor`` tells the truth about this machine."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from flexlam_fast import doctor as room
from flexlam_fast.backend import choose, probe
from flexlam_fast.checkpoint import save_checkpoint
from flexlam_fast.doctor import collect_report, doctor, format_report
from flexlam_fast.ops.attention import available_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_table_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    doctor()
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert rows["python"].endswith(platform.python_version())
    assert rows["torch"].endswith(torch.__version__)
    assert rows["auto"].endswith(f"takes {choose('auto', DEVICE).name}")
    for status in probe(DEVICE):
        assert rows[status.name].endswith(status.reason)
    for title in ("CPU", "GPU", "Build tools", "Optional packages", "Backends", "Attention", "Shipped checkpoints"):
        assert title in lines
    kind = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    for status in available_attention(DEVICE, kind, 64):
        (line,) = [line for line in lines if line.split()[:3] == ["encoder", "by", status.name]]
        assert line.endswith(status.reason)
        assert ("not available" in line) != status.available


def test_json_holds_the_same_report(capsys: pytest.CaptureFixture[str]) -> None:
    doctor(json=True)
    told = json.loads(capsys.readouterr().out)
    report = collect_report()
    assert told["auto"]["name"] == report.auto.name == choose("auto", DEVICE).name
    assert told["cpu"]["threads"] == torch.get_num_threads()
    assert [status["available"] for status in told["backends"]] == [status.available for status in probe(DEVICE)]
    assert {fact["name"]: fact["found"] for fact in told["packages"]}["tyro"] == bool(find_spec("tyro"))
    assert {fact["name"] for fact in told["gpus"]} == (
        {f"cuda:{i}" for i in range(torch.cuda.device_count())} if torch.cuda.is_available() else {"none"}
    )


def test_the_extension_agrees_with_the_kernel_on_the_processor() -> None:
    extension = pytest.importorskip("flexlam_fast._C", exc_type=ImportError)
    features = extension.cpu_features()
    flags = Path("/proc/cpuinfo").read_text().split() if sys.platform == "linux" else []
    if "flags" in flags:
        for name, present in features.items():
            assert present == (name in flags), name
    assert extension.build_info()["cuda"] or not shutil.which("nvcc")
    assert "portable" in extension.build_info()["variants"]
    assert extension.build_info()["cxx_standard"] >= 201703
    present = tuple(name for name, here in features.items() if here)
    assert collect_report().cpu.instructions == present


def test_without_the_extension_the_report_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flexlam_fast._C", None)
    monkeypatch.delattr("flexlam_fast._C", raising=False)
    monkeypatch.setenv("PATH", "")
    report = collect_report()
    assert not report.extension.found
    assert "this machine lacks C++ compiler, cmake" in report.extension.value
    assert report.cpu.instructions == ()
    assert report.extension.value in format_report(report)
    assert not any(tool.found for tool in report.tools)


def test_shipped_checkpoints_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "ASSETS", tmp_path)
    assert collect_report().checkpoints[0].value == "this installation carries no checkpoint"
    save_checkpoint(tmp_path / "good", {"w": torch.ones(30, 40)}, "{}")
    save_checkpoint(tmp_path / "torn", {"w": torch.ones(3)}, "{}")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"")
    good, torn = collect_report().checkpoints
    assert good == ("good", True, "1,200 parameters, verified")
    assert not torn.found
    assert "model.safetensors" in torn.value
