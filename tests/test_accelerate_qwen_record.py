"""The record of accelerating a Qwen3: what was swapped, by which backend, and how it is taken back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from native_cases import BUILT, PLAIN
from qwen_cases import GREEDY, prompt_of, qwen
from torch import nn
from transformers import Qwen3ForCausalLM

from flexlam_fast.accelerate import accelerate
from flexlam_fast.accelerate_qwen import mirror_of
from flexlam_fast.errors import BackendError
from flexlam_fast.sequence.eager import Eager
from flexlam_fast.sequence.fused import Fused


def test_the_record_says_what_happened_and_undo_takes_it_back() -> None:
    hf = qwen()
    before = dict(vars(hf))
    names = {key: value.clone() for key, value in hf.state_dict().items()}
    random = torch.get_rng_state()
    record = accelerate(nn.ModuleDict({"lm": hf}), "reference")
    assert torch.equal(torch.get_rng_state(), random)
    assert str(record).splitlines()[:2] == [
        "accelerate: 1 swapped, 0 left",
        "  swapped  lm  Qwen3ForCausalLM: reference",
    ]
    assert type(hf) is not Qwen3ForCausalLM
    assert isinstance(hf, Qwen3ForCausalLM)
    hf.generate(prompt_of(1, 5), **GREEDY)
    assert vars(hf) == before
    assert list(hf.state_dict()) == list(names)
    assert all(torch.equal(value, names[key]) for key, value in hf.state_dict().items())
    assert accelerate(hf, "reference").left[0].reason == "already accelerated, on reference"
    record.undo()
    assert type(hf) is Qwen3ForCausalLM
    assert vars(hf) == before


def test_every_backend_says_what_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    reasons = {}
    for backend in ("auto", "reference", "triton"):
        hf = qwen()
        (part,) = accelerate(hf, backend).swapped
        reasons[backend] = part.reason
        runner = mirror_of(hf).way(backend)
        assert type(runner) is {"auto": PLAIN, "reference": Eager, "triton": Fused}[backend]
    what = "a prompt by packed products and every later token by C++," if BUILT else "packed products in plain PyTorch"
    assert reasons["auto"] == f"the fastest on cpu: {what} over pages of 64 tokens"
    assert reasons["triton"] == "asked for by name: fused kernels over pages of 64 tokens"


def test_a_backend_that_cannot_run_is_refused_by_name() -> None:
    pytest.importorskip("triton")
    hf = qwen(head_dim=24)
    with pytest.raises(BackendError, match=r"^backend: expected a head dimension that is a power of two .*, got 24$"):
        accelerate(hf, "triton")
    with pytest.raises(BackendError, match=r"^backend: expected one of .*, got 'nonsense'$"):
        accelerate(hf, "nonsense")
    assert type(hf) is Qwen3ForCausalLM


def test_the_other_package_is_looked_up_and_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("accelerate_qwen", "greedy"):
        text = Path(sys.modules[f"flexlam_fast.{name}"].__file__ or "").read_text()
        assert "import transformers" not in text
        assert "from transformers" not in text
    hf = qwen()
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    assert accelerate(nn.Sequential(hf)).left == ()
    assert not [name for name in sys.modules if name.split(".")[0] == "transformers"]
