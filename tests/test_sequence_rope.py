"""RoPE of the sequence model: exact, and without drift, at any position."""

from __future__ import annotations

import importlib

import torch
from sequence_cases import qwen
from torch import Tensor

from flexlam_fast.sequence.model import SequenceModel, rotate, rotation


def test_angles_at_a_hundred_million_are_as_exact_as_at_one() -> None:
    mp = importlib.import_module("mpmath")
    mp.mp.dps = 40
    positions = [0, 1, 2**24 + 1, 10**8, 10**8 + 1, 10**9 + 7]
    r = rotation(torch.tensor(positions), 64, 1e4)
    assert r.cos.dtype == torch.float32
    assert r.cos.shape == (1, 1, len(positions), 64)
    for row, p in enumerate(positions):
        for i in range(32):
            angle = p * mp.mpf(10000) ** (-mp.mpf(2 * i) / 64)
            for channel in (i, i + 32):
                assert abs(float(r.cos[0, 0, row, channel]) - float(mp.cos(angle))) < 3e-7
                assert abs(float(r.sin[0, 0, row, channel]) - float(mp.sin(angle))) < 3e-7


def test_attention_scores_depend_on_distance_alone_at_any_position() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 50, 64, generator=generator), torch.randn(1, 2, 50, 64, generator=generator)

    def scores(start: int) -> Tensor:
        r = rotation(torch.arange(start, start + 50), 64, 1e4)
        return rotate(q, r).double() @ rotate(k, r).double().transpose(2, 3)

    near = scores(0)
    for start in (1, 4097, 10**8, 10**8 + 12345):
        assert float((scores(start) - near).abs().max()) < 1e-5
    assert float((scores(0) - q.double() @ k.double().transpose(2, 3)).abs().max()) > 1.0


def test_hidden_states_do_not_drift_with_the_position() -> None:
    model = SequenceModel.from_qwen3(qwen(num_key_value_heads=2))
    codes = torch.randint(0, 1000, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = model.embed_codes(codes, torch.arange(60))
        near = model(x, torch.arange(60))
        far = model(x, torch.arange(60) + 10**8)
    assert float((far - near).abs().max()) < 1e-4 * float(near.abs().max())


def test_rotation_takes_positions_of_each_session() -> None:
    positions = torch.tensor([[0, 5, 9], [7, 8, 100]])
    r = rotation(positions, 8, 1e4)
    assert r.cos.shape == (2, 1, 3, 8)
    for b in range(2):
        alone = rotation(positions[b], 8, 1e4)
        assert torch.equal(r.sin[b], alone.sin[0])
