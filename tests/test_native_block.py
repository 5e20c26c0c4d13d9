"""Whole blocks of codes in one call: instruction sets, dtypes, threads, neighbours, and a child after a fork."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from native_cases import every_variant, needs_extension
from small import small_config
from torch import Tensor

from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.errors import BudgetError, InputError
from flexlam_fast.ops.block import BlockEngine, Draw, Spot
from flexlam_fast.ops.sampling import draw, gumbel
from flexlam_fast.policy import Policy
from flexlam_fast.sequence import decode
from flexlam_fast.sequence.cache import PagedCache
from flexlam_fast.sequence.eager import Eager
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.native import NativeBlock

pytestmark = needs_extension
CFG, CPU = small_config(), torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLOTS, CODES = CFG.bottleneck.slots, CFG.bottleneck.codebook_size


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Decided:
    """A model, and sessions of it that have seen some frames: what a block starts from."""

    def __init__(self, dtype: torch.dtype, pages: torch.dtype | None = None, batch: int = 3, cfg: FlexLAMConfig = CFG):
        torch.manual_seed(0)
        self.model = SequenceModel(cfg).eval().requires_grad_(False).to(dtype)
        for p in self.model.parameters():
            torch.nn.init.normal_(
                p, mean=1.0 if p.dim() == 1 else 0.0, std=0.1 if p.dim() == 1 else p.shape[-1] ** -0.5
            )
        self.cache = PagedCache(cfg, batch, CPU, pages or dtype)
        self.cache.open(batch)
        generator = torch.Generator().manual_seed(1)
        self.runner = NativeBlock(self.model)
        for t in range(4):
            pixels = torch.rand(batch, 3, cfg.frame, cfg.frame, generator=generator).to(dtype) * 2 - 1
            codes = torch.randint(cfg.bottleneck.codebook_size, (batch, cfg.bottleneck.slots), generator=generator)
            if t == 2:
                self.cache.reset([1 % batch])
            self.appended = decode.append(Eager(self.model), self.cache, codes, pixels)
        self.place = self.cache.place_codes(self.appended.place)

    @property
    def spot(self) -> Spot:
        return self.cache.spot(self.place)

    def block(self, k: int = SLOTS, draw: Draw | None = None, variant: str = "", **kept: Tensor) -> Tensor:
        first = self.appended.logits.float()
        return self.runner.engine().generate(
            self.cache.k, self.cache.v, self.spot, first, k, draw, variant=variant, **kept
        )


@torch.no_grad()
def plain_logits(decided: Decided, given: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits ``[B, k, C]`` of the model's own modules in ``dtype``, fed the given codes."""
    cache = PagedCache(CFG, len(given), CPU, dtype)
    for name in ("o_frame", "z_frame", "t", "count"):
        getattr(cache, name).copy_(getattr(decided.cache, name))
    cache.free = []
    cache.k.copy_(decided.cache.k), cache.v.copy_(decided.cache.v)
    model = SequenceModel(CFG).eval().requires_grad_(False).to(dtype)
    model.load_state_dict(decided.model.state_dict())
    runner, found = Eager(model), [decided.appended.logits.to(dtype)]
    steps = runner.prepare(cache, decided.place)
    for j in range(given.shape[1] - 1):
        x = model.embed_codes(given[:, j : j + 1], torch.arange(j, j + 1))
        found.append(runner.logits(x, steps.column(j)).to(dtype))
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_variant
def test_every_instruction_set_passes_codes_within_the_budget(variant: str, dtype: torch.dtype) -> None:
    decided = Decided(dtype)
    given = torch.randint(CODES, (3, SLOTS), dtype=torch.int32)
    logits = torch.full((3, SLOTS, CODES), math.nan)
    codes = decided.block(variant=variant, given=given, logits=logits)
    assert torch.equal(codes.long(), logits.argmax(-1))
    exact, plain = (plain_logits(decided, given, kind).double()[:, 1:] for kind in (torch.float64, dtype))
    ours, theirs = (logits[:, 1:].double() - exact), plain - exact
    assert float(ours.abs().max()) <= 2 * float(theirs.abs().max())
    assert float(ours.square().mean()) <= 4 * float(theirs.square().mean())


@pytest.mark.parametrize("pages", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_may_have_another_dtype_than_the_weights(dtype: torch.dtype, pages: torch.dtype) -> None:
    decided = Decided(dtype, pages)
    wide = Decided(dtype, torch.float32)
    given = torch.randint(CODES, (3, SLOTS), dtype=torch.int32)
    ours, theirs = torch.empty(3, SLOTS, CODES), torch.empty(3, SLOTS, CODES)
    decided.block(given=given, logits=ours)
    wide.block(given=given, logits=theirs)
    spread = float(theirs.std())
    coarsest = max(torch.finfo(kind).eps for kind in (dtype, pages))
    assert float((ours - theirs)[:, 1:].abs().max()) < 20 * coarsest * spread
    assert decided.cache.k.dtype == pages


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neither_threads_nor_neighbours_change_a_bit(dtype: torch.dtype) -> None:
    cfg = small_config()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        decided = Decided(dtype, cfg=cfg)
        logits = torch.empty(3, SLOTS, CODES)
        codes = decided.block(logits=logits)
        results.append((codes, logits, decided.cache.k.clone(), decided.cache.v.clone()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    decided = Decided(dtype)
    for s in range(3):
        alone = torch.empty(1, SLOTS, CODES)
        spot, first = Spot(*(t[s : s + 1] for t in decided.spot)), decided.appended.logits[s : s + 1].float()
        engine = decided.runner.engine()
        codes = engine.generate(decided.cache.k, decided.cache.v, spot, first, SLOTS, logits=alone)
        assert torch.equal(alone[0], results[0][1][s])
        assert torch.equal(codes[0], results[0][0][s])


@pytest.mark.parametrize("top_k", [0, 1, 5, 10**6])
def test_codes_are_drawn_as_by_plain_operations(top_k: int) -> None:
    decided = Decided(torch.float32)
    noise = gumbel(torch.tensor([5, 0]), None, 3 * SLOTS, CODES).view(3, SLOTS, CODES)
    logits = torch.empty(3, SLOTS, CODES)
    codes = decided.block(draw=Draw(0.7, top_k, noise), logits=logits)
    for j in range(SLOTS):
        assert torch.equal(draw(logits[:, j], 0.7, top_k, noise[:, j]), codes[:, j].long())


def test_ties_and_nan_are_chosen_as_argmax_does() -> None:
    decided = Decided(torch.float32)
    first = torch.zeros(3, CODES)
    first[0, [3, 5]], first[1, 7], first[2, :] = 2.0, math.nan, -math.inf
    engine = decided.runner.engine()
    codes = engine.generate(decided.cache.k, decided.cache.v, decided.spot, first, 1)
    assert codes.flatten().tolist() == first.argmax(-1).tolist() == [3, 7, 0]


def test_weights_written_in_place_and_weights_moved_both_count() -> None:
    policy, other = Policy(CFG, seed=1, device="cpu"), Policy(CFG, seed=2, device="cpu", backend="reference")
    frame = torch.full((1, 16, 16, 3), 99, dtype=torch.uint8)
    policy.act(frame, SLOTS)
    policy.load_state("f", other.state())
    for moved in ("out", "down", "norm1", "norm.weight", "head", "codes", "gate", "v.", "none"):
        policy.reset()
        other.reset()
        assert torch.equal(policy.act(frame, SLOTS).codes, other.act(frame, SLOTS).codes)
        for which in (policy, other):  # elsewhere in memory, other numbers
            for name, p in which.sequence.named_parameters():
                p.data = p.data.flip(0) * 3 if moved in name else p.data


@pytest.mark.usefixtures("threads")
def test_two_policies_in_two_threads_do_not_disturb_each_other() -> None:
    torch.set_num_threads(2)
    frames = torch.randint(0, 256, (30, 1, 16, 16, 3), dtype=torch.uint8)
    policies = [Policy(CFG, seed=seed, device="cpu") for seed in (1, 2)]  # here: their start draws from one generator
    found: dict[int, list[Tensor]] = {}

    def work(which: int) -> None:
        policies[which].reset()
        found[which] = [policies[which].act(frame, SLOTS).codes for frame in frames]

    for which in (0, 1):
        work(which)
    expected, found = found, {}
    for _ in range(5):
        workers = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for which in (0, 1):
            assert all(torch.equal(a, b) for a, b in zip(found[which], expected[which], strict=True))


@pytest.mark.usefixtures("threads")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_block_works_in_a_child_that_was_forked_after_use() -> None:
    """Its threads stay behind in the parent; a child goes on with one, and the same bits."""
    torch.set_num_threads(2)
    decided = Decided(torch.float32)
    before = decided.block()
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(decided.block(), before) else 3)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_one_sentence_says_what_is_wrong() -> None:
    decided = Decided(torch.float32)
    engine, spot, first = decided.runner.engine(), decided.spot, decided.appended.logits.float()
    k, v = decided.cache.k, decided.cache.v
    calls = [
        (lambda: engine.generate(k, v, spot, first, 0), BudgetError, r"^k: expected .*, got 0"),
        (lambda: engine.generate(k, v, spot, first, SLOTS + 1), BudgetError, r"^k: expected "),
        (lambda: engine.generate(k[1:], v, spot, first, 1), InputError, r"^k_pages: expected \[1,pages,P,"),
        (lambda: engine.generate(k, v.half(), spot, first, 1), InputError, r"^v_pages: expected contiguous pages like"),
        (lambda: engine.generate(k, v, spot, first[:, 1:], 1), InputError, rf"^first: expected \[B,{CODES}\] float32"),
        (
            lambda: engine.generate(k, v, spot._replace(table=spot.table.long()), first, 1),
            InputError,
            r"^table: expected",
        ),
        (lambda: engine.generate(k, v, spot, first, 2, Draw(1.0, 0, first)), InputError, r"^noise: expected \[3,2,"),
        (
            lambda: engine.generate(k, v, spot, first, 2, given=spot.rows.int()),
            InputError,
            r"^given: expected \[3,2\] int32",
        ),
        (lambda: engine.generate(k, v, spot, first, 2, logits=first), InputError, r"^logits: expected \[3,2,"),
        (
            lambda: engine.generate(k, v, spot, first, 2, logits=torch.empty(2, 3, CODES).transpose(0, 1)),
            InputError,
            r"^logits: expected a contiguous tensor to fill",
        ),
        (
            lambda: engine.generate(k, v, spot, first, 2, given=torch.full((3, 2), CODES, dtype=torch.int32)),
            InputError,
            rf"^given: expected codes in 0\.\.{CODES - 1}, got {CODES}\.\.{CODES}$",
        ),
        (
            lambda: engine.generate(
                k,
                v,
                spot._replace(rows=spot.rows.repeat(1, 2), positions=spot.positions.repeat(1, 2)),
                first,
                SLOTS + 1,
            ),
            BudgetError,
            rf"^k: expected .*{SLOTS}",
        ),
        (
            lambda: BlockEngine(engine.weights._replace(head=engine.weights.head.half()), 1e4, 1e-6),
            InputError,
            r"^weights: ",
        ),
    ]
    for call, kind, sentence in calls:
        with pytest.raises(kind, match=sentence) as caught:
            call()
        assert "\n" not in str(caught.value)
    none = Spot(*(t[:0] for t in spot))
    assert engine.generate(k, v, none, first[:0], 2).shape == (0, 2)
