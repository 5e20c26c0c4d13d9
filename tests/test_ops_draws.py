"""Normal noise and uniform words: the same bits everywhere, the distributions they promise, and what they depend on."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from linear_cases import every_kernel
from native_cases import Forced, every_variant, needs_extension

from flexlam_fast import ops
from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.ops import draws, native_frames, philox

SEED = torch.tensor([2**40 + 5, 2**33 + 7])
STREAMS = torch.tensor([0, 3, 2**35 + 1, -4])
MANY = 1 << 20


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def million() -> torch.Tensor:
    """2^20 numbers, 64 streams of 16,384, in fp64."""
    return ops.draw_normal(torch.tensor([12345, 6]), torch.arange(64), MANY // 64).double()


def words(counter: list[int], key: list[int]) -> list[int]:
    """Four words in plain PyTorch."""
    packed = torch.tensor(key[0] + (key[1] << 32) - ((key[1] >> 31) << 64))
    return [int(w) for w in philox.words(packed, *(torch.tensor(c) for c in counter))]


def test_all_four_words_have_the_published_answers() -> None:
    """Random123's known answers of philox4x32-10."""
    assert words([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert words(pi, [0xA4093822, 0x299F31D0]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("count", [0, 1, 4, 63, 64, 65, 1029, 2500])
@every_kernel
def test_every_backend_draws_the_same_bits(backend: str, device: str, count: int) -> None:
    expected = ops.draw_normal(SEED, STREAMS, count, backend="reference")
    ours = ops.draw_normal(SEED.to(device), STREAMS.to(device), count, backend=backend)
    assert (ours.shape, ours.dtype) == ((4, count), torch.float32)
    assert torch.equal(ours.cpu(), expected)


@every_kernel
def test_words_and_uniform_numbers_are_the_same_everywhere(backend: str, device: str) -> None:
    streams = torch.cat([STREAMS, torch.arange(300)])
    for as_words in (False, True):
        expected = ops.draw_uniform(SEED, streams, words=as_words, backend="reference")
        ours = ops.draw_uniform(SEED.to(device), streams.to(device), words=as_words, backend=backend)
        assert ours.dtype == (torch.int64 if as_words else torch.float32)
        assert torch.equal(ours.cpu(), expected)


@every_variant
def test_every_instruction_set_draws_the_same_bits(variant: str) -> None:
    for count in (5, 64, 127, 16384 + 33):
        ours = native_frames.draw_noise(Forced(variant), SEED, STREAMS, count)  # type: ignore[arg-type]
        assert torch.equal(ours, draws.normal_reference(SEED, STREAMS, count)), count


@needs_extension
@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_no_bit() -> None:
    drawn = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        drawn.append(ops.draw_normal(SEED, STREAMS, 40_000, backend="native"))
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])


def test_a_sample_depends_on_nothing_but_key_step_and_stream() -> None:
    whole = ops.draw_normal(SEED, torch.arange(50), 333)
    some = torch.tensor([49, 7, 7, 0])
    assert torch.equal(ops.draw_normal(SEED, some, 333), whole[some])
    assert torch.equal(ops.draw_normal(SEED, some, 100), whole[some, :100]), (
        "a shorter draw is the beginning of a longer"
    )
    every = torch.arange(100)[::2]
    assert torch.equal(ops.draw_normal(SEED, every, 9), ops.draw_normal(SEED, every.contiguous(), 9))
    for other in (SEED + torch.tensor([1, 0]), SEED + torch.tensor([0, 1]), SEED + torch.tensor([1 << 32, 0])):
        assert float((ops.draw_normal(other, torch.arange(50), 333) == whole).float().mean()) < 1e-3
    assert ops.draw_normal(SEED, torch.empty(0, dtype=torch.int64), 9).shape == (0, 9)
    assert ops.draw_uniform(SEED, torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_noise_has_the_moments_of_the_normal_distribution(million: torch.Tensor) -> None:
    """Within four standard deviations of each estimate."""
    x = million.flatten()
    assert abs(float(x.mean())) < 4 / math.sqrt(MANY)
    assert abs(float(x.square().mean()) - 1) < 4 * math.sqrt(2 / MANY)
    assert abs(float((x**3).mean())) < 4 * math.sqrt(15 / MANY)
    assert abs(float((x**4).mean()) - 3) < 4 * math.sqrt(96 / MANY)
    assert abs(float((x.abs() > 4).sum()) - MANY * 6.334e-5) < 4 * math.sqrt(MANY * 6.334e-5)
    assert float(x.abs().max()) < 6.77


def test_noise_is_distributed_as_the_normal_distribution(million: torch.Tensor) -> None:
    """Kolmogorov and Smirnov at 1 in 1,000, for all numbers and for those of each word of a block."""
    for x in (million.flatten(), *million.view(-1, 4).unbind(1)):
        ranks = torch.special.ndtr(x.sort().values)
        steps = torch.arange(x.numel() + 1, dtype=torch.float64) / x.numel()
        distance = max(float((steps[1:] - ranks).max()), float((ranks - steps[:-1]).max()))
        assert distance < 1.95 / math.sqrt(x.numel())


def test_streams_and_neighbours_are_not_correlated(million: torch.Tensor) -> None:
    """Pairs of 64 streams, numbers up to eight apart, and their squares, which a bad pair would tie together."""
    n = million.shape[1]
    for x in (million, (million.square() - 1) / math.sqrt(2)):
        between = (x @ x.T / n).fill_diagonal_(0.0)
        assert float(between.abs().max()) < 4.7 / math.sqrt(n), "2,016 pairs: 1 in 200"
        flat = x.flatten()
        for lag in range(1, 9):
            assert abs(float((flat[lag:] * flat[:-lag]).mean())) < 4 / math.sqrt(MANY), lag
    later = ops.draw_normal(torch.tensor([12345, 7]), torch.arange(64), n).double()
    assert abs(float((later * million).mean())) < 4 / math.sqrt(MANY)


def test_uniform_numbers_are_uniform_and_independent_of_the_noise(million: torch.Tensor) -> None:
    seed, n = torch.tensor([12345, 6]), 100_000
    u = ops.draw_uniform(seed, torch.arange(n)).double()
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / n)
    counts = torch.bincount((u * 256).long(), minlength=256).double()
    chi = float(((counts - n / 256) ** 2 / (n / 256)).sum())
    assert 175 < chi < 350, "chi-squared with 255 degrees of freedom: 1 in 10,000 on either side"
    word = ops.draw_uniform(seed, torch.arange(n), words=True)
    assert torch.equal(u.float(), (word >> 8).float() / 2**24)
    assert not set(word.tolist()) >= set(philox.draw(seed, 64).tolist()), "not the words that lengths are drawn from"


BAD = [
    (lambda: ops.draw_normal(SEED.int(), STREAMS, 4), r"^seed: expected \[2\] int64, got \[2\] int32 cpu$"),
    (lambda: ops.draw_normal(SEED, STREAMS.float(), 4), r"^streams: expected \[B\] int64 cpu, got \[4\] float32 cpu$"),
    (lambda: ops.draw_normal(SEED, STREAMS, -1), r"^count: expected an integer in 0\.\.4294967296, got -1$"),
    (lambda: ops.draw_normal(SEED, STREAMS, 2.0), r"^count: expected an integer in 0\.\.4294967296, got 2\.0$"),
    (lambda: ops.draw_uniform(SEED[:1], STREAMS), r"^seed: expected \[2\] int64, got \[1\] int64 cpu$"),
]


@pytest.mark.parametrize(("call", "sentence"), BAD, ids=[s for _, s in BAD])
def test_one_sentence_says_what_is_wrong(call: object, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        call()  # type: ignore[operator]


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(BackendError, match="expected one of"):
        ops.draw_normal(SEED, STREAMS, 4, backend="cpp")


@every_kernel
def test_opcheck(backend: str, device: str) -> None:
    seed, streams = SEED.to(device), STREAMS.to(device)
    for op, args in (("draw_noise", (seed, streams, 9, backend)), ("draw_words", (seed, streams, backend))):
        told = torch.library.opcheck(getattr(torch.ops.flexlam_fast, op).default, args)
        assert set(told.values()) == {"SUCCESS"}


@pytest.mark.gpu
def test_a_captured_graph_draws_afresh_when_its_seed_changes() -> None:
    seed, streams = torch.tensor([1, 0], device="cuda"), torch.arange(8, device="cuda")
    ops.draw_normal(seed, streams, 3000)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.draw_normal(seed, streams, 3000)
        seed[1] += 1
    for step in range(3):
        graph.replay()
        assert torch.equal(out.cpu(), ops.draw_normal(torch.tensor([1, step]), torch.arange(8), 3000))
