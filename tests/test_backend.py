"""Backends: auto takes what works, a name works or raises."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from small import small_config

from flexlam_fast import backend as room
from flexlam_fast.backend import NAMES, choose, probe
from flexlam_fast.errors import BackendError
from flexlam_fast.policy import Policy

DEVICES = ["cpu", "cuda", "meta"]


@pytest.mark.parametrize("device", DEVICES)
def test_probe_names_every_backend_once_with_a_reason(device: str) -> None:
    statuses = probe(device)
    assert sorted(["auto", *(status.name for status in statuses)]) == sorted(NAMES)
    for status in statuses:
        assert len(status.reason) > 10
        assert "\n" not in status.reason
    assert {status.name: status.available for status in statuses}["reference"]


@pytest.mark.parametrize("device", DEVICES)
def test_auto_takes_the_first_that_works_and_says_why_not_the_others(device: str) -> None:
    choice = choose("auto", device)
    assert choice.name == next(status.name for status in probe(device) if status.available)
    for status in probe(device):
        assert status.available or status.reason in choice.reason


@pytest.mark.parametrize("device", DEVICES)
def test_a_backend_asked_for_by_name_works_or_raises(device: str) -> None:
    for status in probe(device):
        if status.available:
            assert choose(status.name, device).name == status.name
        else:
            with pytest.raises(BackendError) as caught:
                choose(status.name, device)
            assert status.reason in str(caught.value)
    with pytest.raises(BackendError, match="expected one of auto, reference, triton, native, got 'cudnn'"):
        choose("cudnn", device)


def test_native_runs_here_and_auto_takes_it() -> None:
    pytest.importorskip("flexlam_fast._C", exc_type=ImportError)
    assert choose("auto", "cpu").name == "native"
    assert "C++ for" in choose("native", "cpu").reason


def test_without_the_extension_auto_takes_the_reference_and_native_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
    assert choose("auto", "cpu").name == "reference"
    with pytest.raises(BackendError, match="the extension was not built"):
        choose("native", "cpu")
    with pytest.raises(BackendError, match="triton is not installed"):
        choose("triton", "cuda")


def test_triton_runs_on_a_cpu_only_in_its_interpreter() -> None:
    pytest.importorskip("triton")
    code = "from flexlam_fast.backend import choose; choose('triton', 'cpu')"
    plain = {"PATH": "", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain, check=False)
    assert "Triton compiles for GPUs, not for cpu" in done.stderr.splitlines()[-1]


def test_a_policy_on_another_backend_decides_the_same(small_policy_codes: list[torch.Tensor]) -> None:
    first, *others = small_policy_codes
    assert others
    assert all(torch.equal(first, other) for other in others)


@pytest.fixture
def small_policy_codes() -> list[torch.Tensor]:
    cfg = small_config()
    frame = torch.randint(0, 256, (3, 1, cfg.frame, cfg.frame, 3), dtype=torch.uint8)
    out = []
    for status in probe("cpu"):
        if status.available and status.name != "triton":
            policy = Policy(cfg, backend=status.name)
            policy.reset(1)
            out.append(torch.cat([policy.act(f, cfg.bottleneck.slots).codes for f in frame]))
    return out


@pytest.mark.parametrize(
    ("capability", "available", "says"),
    [
        ((7, 5), False, "it has code for sm_80 and later, this is a card"),
        ((8, 6), True, "PTX, compiled here for sm_86"),
        ((9, 0), True, "machine code for sm_90a"),
        ((12, 0), True, "PTX, compiled here for sm_120"),
    ],
)
def test_cuda_code_is_for_ampere_and_later_and_says_in_which_form(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], available: bool, says: str
) -> None:
    extension = pytest.importorskip("flexlam_fast._C", exc_type=ImportError)
    monkeypatch.setattr(extension, "build_info", lambda: {"cuda": "13.0", "variants": ["avx2"]})
    fakes = dict(is_available=lambda: True, get_device_capability=lambda: capability, get_device_name=lambda: "a card")
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    status = next(s for s in probe("cuda") if s.name == "native")
    assert (status.available, says in status.reason) == (available, True), status.reason
