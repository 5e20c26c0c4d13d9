"""The fast ways through the sequence model against the reference, over many decisions: ``python bench/parity.py``.

Three caches see the same frames, code blocks, budgets and resets: exact (the reference in fp64), plain (the reference
in the working dtype) and fast. All are fed the codes that plain chose, so every logit can be compared. Errors must be
within the error budget (``flexlam_fast.testing``): at most twice those of plain. Fast may choose another code only
where plain's own two best are closer than the budget; those are counted.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.policy import Policy
from flexlam_fast.sequence import decode
from flexlam_fast.sequence.cache import PagedCache, Placement
from flexlam_fast.sequence.decode import BlockRunner, Runner
from flexlam_fast.sequence.eager import Eager
from flexlam_fast.sequence.fused import Fused
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.native import Native, NativeBlock
from flexlam_fast.sequence.native_cuda import CudaBlock
from flexlam_fast.sequence.packed import Packed
from flexlam_fast.testing import FORWARD_FACTOR

RUNNERS: dict[str, Callable[[SequenceModel], Runner]] = {
    "packed": Packed,
    "native": Native,
    "block": NativeBlock,
    "fused": Fused,
    "cuda": lambda model: CudaBlock(model, Eager(model)),
}


class Parity(NamedTuple):
    """Largest and rms errors of fast and plain against exact; codes compared, and how many differ, at near ties."""

    fast_max: float
    plain_max: float
    fast_rms: float
    plain_rms: float
    codes: int
    near_ties: int

    def holds(self) -> bool:
        """Whether fast is within the error budget."""
        return self.fast_max <= FORWARD_FACTOR * self.plain_max and self.fast_rms <= FORWARD_FACTOR * self.plain_rms


class Scripted:
    """A way through the layers that is told which codes to feed, and remembers its logits."""

    def __init__(self, runner: Runner, script: list[Tensor]) -> None:
        self.runner, self.model, self.script = runner, runner.model, script
        self.prepare, self.ready, self.choose = runner.prepare, runner.ready, runner.choose
        self.seen: list[Tensor] = []

    def logits(self, x: Tensor, step: Any) -> Tensor:
        """As the runner."""
        self.seen.append(self.runner.logits(x, step))
        return self.seen[-1]

    def feed(self, logits: Tensor, slot: int, sampling: Any) -> tuple[Tensor, Tensor]:
        """The scripted code of ``slot``; without a script, the greedy one, which becomes the script."""
        if len(self.script) <= slot:
            self.script.append(logits.argmax(-1))
        code = self.script[slot]
        return code.int(), self.model.embed_codes(code.unsqueeze(1), torch.arange(slot, slot + 1, device=code.device))


class ScriptedBlock(Scripted):
    """The same for a way that generates a whole block in one call."""

    def block(self, cache: PagedCache, place: Placement, first: Tensor, k: int, sampling: Any) -> Tensor:
        """Feed the script; remember the logits that codes would be chosen from."""
        given = torch.stack([*self.script[: k - 1], torch.zeros_like(first[:, 0], dtype=torch.int64)], dim=1).int()
        logits = torch.empty(*given.shape, first.shape[1], device=first.device)
        codes: Tensor = self.runner.block(cache, place, first, k, sampling, given=given, logits=logits)  # type: ignore[attr-defined]
        self.seen = list(logits.unbind(1))
        return codes


@torch.no_grad()
def compare(
    make: Callable[[SequenceModel], Runner],
    cfg: FlexLAMConfig,
    dtype: torch.dtype,
    device: torch.device,
    decisions: int,
    batch: int,
    seed: int = 0,
    weights: dict[str, Tensor] | None = None,
) -> Parity:
    """Compare over ``decisions`` decisions of ``batch`` sessions that start anew at different times.

    ``weights`` are those of the sequence model; None draws random ones.

    Raises:
        AssertionError: a code that differs though plain's two best are further apart than the budget.
    """
    torch.manual_seed(seed)
    plain = SequenceModel(cfg).eval().requires_grad_(False)
    for p in plain.parameters():  # wider than the usual start, so that codes are clear choices that vary
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.1 if p.dim() == 1 else p.shape[-1] ** -0.5)
    if weights is not None:
        plain.load_state_dict(weights)
    plain.to(device, dtype)
    models = [plain, plain if make is Eager else copy.deepcopy(plain), copy.deepcopy(plain).double()]
    runners = [Eager(models[0]), make(models[1]), Eager(models[2])]
    kinds = [dtype, dtype, torch.float64]
    caches = [PagedCache(cfg, batch, device, kind) for kind in kinds]
    for cache in caches:
        cache.open(batch)
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    slots, found, choices = cfg.bottleneck.slots, [], []
    for _ in range(decisions):
        if draw.random() < 0.15:
            chosen = draw.sample(range(batch), 1)
            for cache in caches:
                cache.reset(chosen)
        pixels = torch.rand(batch, cfg.channels, cfg.frame, cfg.frame, generator=generator) * 2 - 1
        codes = torch.randint(cfg.bottleneck.codebook_size, (batch, slots), generator=generator).to(device)
        pixels, k, script = pixels.to(device, dtype), draw.randint(1, slots), []
        rows = []
        for runner, cache, kind in zip(runners, caches, kinds, strict=True):
            way = (ScriptedBlock if isinstance(runner, BlockRunner) else Scripted)(runner, script)
            decode.generate(way, cache, decode.append(way, cache, codes, pixels.to(kind)), k)
            rows.append(torch.stack(way.seen, dim=1).double())
        found.append([(rows[i] - rows[2]).flatten() for i in (0, 1)])
        choices.append((rows[0], rows[1]))
    errors = [torch.cat(part) for part in zip(*found, strict=True)]
    plain_max, fast_max = (float(e.abs().max()) for e in errors)
    plain_rms, fast_rms = (float(e.square().mean().sqrt()) for e in errors)
    compared = ties = 0
    for ours, fast in choices:
        best = ours.topk(2).values
        other = ours.argmax(-1) != fast.argmax(-1)
        clear = best[..., 0] - best[..., 1] > 2 * FORWARD_FACTOR * plain_max  # each of the two may be off by the budget
        assert not bool((other & clear).any()), "expected other codes at near ties only, got one at a clear choice"
        compared, ties = compared + other.numel(), ties + int(other.sum())
    return Parity(fast_max, plain_max, fast_rms, plain_rms, compared, ties)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="of the model")
    parser.add_argument("--checkpoint", help="of a policy, or a shipped one's name; instead of random weights")
    parser.add_argument(
        "--way", choices=RUNNERS, default="block", help="packed, native, block (CPU), fused (Triton), cuda"
    )
    parser.add_argument("--decisions", type=int, default=300, help="how many")
    parser.add_argument("--batch", type=int, default=3, help="sessions, which start anew at different times")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of weights, pages"
    )
    options = parser.parse_args()
    cfg, device, weights = FlexLAMConfig.preset(options.preset), torch.device(options.device), None
    if options.checkpoint:
        policy = Policy.from_pretrained(options.checkpoint, device="cpu")
        cfg, weights = policy.cfg, policy.sequence.state_dict()
    dtype = getattr(torch, options.dtype)
    found = compare(RUNNERS[options.way], cfg, dtype, device, options.decisions, options.batch, weights=weights)
    print(
        f"{options.checkpoint or options.preset}, {options.way}, {options.dtype}, {options.decisions} decisions of "
        f"{options.batch} sessions: "
        f"largest error {found.fast_max:.3g} (reference {found.plain_max:.3g}), rms {found.fast_rms:.3g} "
        f"({found.plain_rms:.3g}); {found.codes} codes, {found.near_ties} other ones at near ties"
    )
    if not found.holds() or not math.isfinite(found.fast_max):
        raise SystemExit("parity: expected errors of at most twice the reference's")


if __name__ == "__main__":
    main()
