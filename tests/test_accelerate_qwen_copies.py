"""Copies of an accelerated Qwen3: accelerated in memory, of the original class in a file."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from qwen_cases import GREEDY, note_ways, prompt_of, qwen
from transformers import Qwen3ForCausalLM

from flexlam_fast.accelerate import accelerate


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that generated, in order."""
    return note_ways(monkeypatch)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_it_is_pickled_as_the_original_class(protocol: int) -> None:
    hf, prompt = qwen(num_hidden_layers=1), prompt_of(1, 5)
    accelerate(hf)
    expected = hf.generate(prompt, **GREEDY)
    data = pickle.dumps(hf, protocol)
    assert b"flexlam" not in data
    loaded = pickle.loads(data)
    assert type(loaded) is Qwen3ForCausalLM
    assert torch.equal(loaded.generate(prompt, **GREEDY), expected)


def test_files_are_those_of_the_original(tmp_path: Path) -> None:
    hf, prompt = qwen(tie_word_embeddings=True), prompt_of(1, 5)
    accelerate(hf)
    expected = hf.generate(prompt, **GREEDY)
    hf.save_pretrained(tmp_path)
    assert '"Qwen3ForCausalLM"' in (tmp_path / "config.json").read_text()
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.generate(prompt, **GREEDY), expected)
    file = io.BytesIO()
    torch.save(hf.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file))


def test_a_deep_copy_stays_accelerated_and_is_independent(ours: list[str]) -> None:
    hf, prompt = qwen(), prompt_of(1, 20)
    accelerate(hf)
    expected = hf.generate(prompt, **GREEDY)
    twin = copy.deepcopy(hf)
    with torch.no_grad():
        for p in hf.parameters():
            p.mul_(-1)
    assert torch.equal(twin.generate(prompt, **GREEDY), expected)
    assert len(ours) == 2
