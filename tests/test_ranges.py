"""Ranges for profilers: nothing while off, the right names on either side, balanced in every thread."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small import small_config
from torch.profiler import ProfilerActivity, profile

from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.policy import Policy
from flexlam_fast.ranges import LAYERS, NOTHING, TORCH, set_ranges, span
from flexlam_fast.sequence.native import NativeBlock
from flexlam_fast.sequence.packed import Packed

ROOT = Path(__file__).resolve().parents[1]


class FakeNvtx:
    """What ranges use of the ``nvtx`` package; keeps a stack for every thread, and all that was opened."""

    def __init__(self) -> None:
        self.own, self.opened = threading.local(), []
        log = self

        class annotate:
            def __init__(self, name: str) -> None:
                self.name = name

            def __enter__(self) -> None:
                log.stack().append(self.name)
                log.opened.append("/".join(log.stack()))

            def __exit__(self, *error: object) -> None:
                assert log.stack().pop() == self.name

        self.annotate = annotate

    def stack(self) -> list[str]:
        if not hasattr(self.own, "stack"):
            self.own.stack = []
        return self.own.stack


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    yield
    set_ranges(0)


@pytest.fixture
def nvtx(monkeypatch: pytest.MonkeyPatch) -> FakeNvtx:
    fake = FakeNvtx()
    monkeypatch.setitem(sys.modules, "nvtx", fake)
    return fake


def test_while_off_a_span_is_one_object_that_does_nothing_within_a_microsecond(nvtx: FakeNvtx) -> None:
    assert span("encode") is span("layer", LAYERS, 3) is NOTHING
    with span("a"), span("a"), span("b"):
        pass

    def both() -> None:
        with span("encode"):
            pass
        with span("layer", LAYERS, 3):
            pass

    assert min(timeit.repeat(both, number=1000, repeat=50)) / 2000 < 1e-6
    assert not nvtx.opened


def test_importing_and_switching_off_loads_neither_torch_nor_nvtx() -> None:
    script = """
import sys
from flexlam_fast.ranges import set_ranges, span
with span("encode"): set_ranges(0)
assert not {"torch", "nvtx", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)


def test_a_level_opens_its_own_and_coarser_ranges(nvtx: FakeNvtx) -> None:
    for level, expected in ((1, ["codes"]), (2, ["codes", "codes/layer 3"]), (0, [])):
        nvtx.opened.clear()
        set_ranges(level)
        with span("codes"), span("layer", LAYERS, 3):
            pass
        assert nvtx.opened == expected
        assert not nvtx.stack()


def test_an_exception_closes_a_range_and_goes_on(nvtx: FakeNvtx) -> None:
    set_ranges(1)
    with pytest.raises(ZeroDivisionError), span("encode"):
        _ = 1 / 0
    assert nvtx.opened == ["encode"]
    assert not nvtx.stack()


def test_a_range_ends_as_it_began_whatever_is_switched_meanwhile(nvtx: FakeNvtx) -> None:
    set_ranges(1)
    with span("encode"):
        set_ranges(0)
        with span("append"):
            set_ranges(2, TORCH)
        assert nvtx.stack() == ["encode"]
    assert not nvtx.stack()
    assert nvtx.opened == ["encode"]


def test_threads_have_ranges_of_their_own_while_another_switches(nvtx: FakeNvtx) -> None:
    failures, stop = [], threading.Event()

    def act() -> None:
        try:
            while not stop.is_set():
                with span("codes"), span("layer", LAYERS, 1), span("layer", LAYERS, 2):
                    pass
                assert not nvtx.stack()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=act) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(60):
        set_ranges(i % 3)
        time.sleep(1e-4)  # lets the others run
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert {"codes", "codes/layer 1/layer 2"} <= set(nvtx.opened)


def test_pytorch_with_cuda_stands_in_for_the_nvtx_package(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvtx()
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "nvtx", SimpleNamespace(range=fake.annotate))
    set_ranges(1)
    with span("translate"):
        pass
    assert fake.opened == ["translate"]


def test_without_either_one_sentence_says_so_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(BackendError, match=r"^set_ranges: expected the nvtx package or .*, got neither \(pip") as error:
        set_ranges(1)
    assert "\n" not in str(error.value)
    assert span("encode") is NOTHING
    set_ranges(0)


@pytest.mark.parametrize("level", [-1, 3, True, 1.0, "1", None])
def test_another_level_is_refused(level: object) -> None:
    with pytest.raises(InputError, match=r"^level: expected 0 \(off\), 1 .* or 2 .*, got "):
        set_ranges(level)  # type: ignore[arg-type]


def test_another_profiler_is_refused() -> None:
    with pytest.raises(InputError, match="^to: expected 'nvtx' or 'torch', got 'chrome'$"):
        set_ranges(1, to="chrome")


def test_ranges_go_to_torch_profiler() -> None:
    set_ranges(2, TORCH)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, span("codes"), span("layer", LAYERS, 7):
        torch.ones(3) + 1
    seen = {event.key: event.count for event in profiler.key_averages()}
    assert seen["codes"] == seen["layer 7"] == 1


def test_the_nvtx_package_itself_takes_them() -> None:
    pytest.importorskip("nvtx")
    set_ranges(2)
    with span("codes"), span("layer", LAYERS, 7):
        assert span("codes") is not NOTHING


def test_a_decision_marks_its_stages_codes_and_layers(nvtx: FakeNvtx) -> None:
    cfg, k = small_config(), 3
    policy, plain = Policy(cfg), Policy(cfg)
    frames = torch.randint(0, 256, (3, 1, cfg.frame, cfg.frame, cfg.channels), dtype=torch.uint8)
    stages = ["encode", "append", "codes", "translate"]
    for level, frame in zip((0, 1, 2), frames, strict=True):
        nvtx.opened.clear()
        set_ranges(level)
        marked = policy.act(frame, k)
        seen = nvtx.opened if level < LAYERS else [name for name in nvtx.opened if "/" not in name]
        assert seen == (stages if level else [])
        set_ranges(0)
        assert torch.equal(marked.codes, plain.act(frame, k).codes)
    block = isinstance(policy.stages.runner, NativeBlock)  # a block of codes is one call
    passes = [] if block else [f"codes/code {j}" for j in range(k - 1)]
    assert [name for name in nvtx.opened if name.count("/") == 1 and name.startswith("codes")] == passes
    if isinstance(policy.stages.runner, Packed):
        layers = [f"{of}/layer {i}" for of in ("append", *passes) for i in range(cfg.sequence.layers)]
        assert sorted(name for name in nvtx.opened if "layer" in name) == sorted(layers)
