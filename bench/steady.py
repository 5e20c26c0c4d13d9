"""Whether a late decision costs what an early one does: ``python bench/steady.py --preset dmlab --decisions 5000``.

Two policies of the same weights see the same frames, one up to its 100th decision, the other up to its 5,000th. From
there on they decide in turns, and the medians are compared: late must be within 10% of early.
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.policy import Policy

EARLY = 100


class Steady(NamedTuple):
    """Median milliseconds of a decision about the 100th, and of one about the late one."""

    early_ms: float
    late_ms: float

    def ratio(self) -> float:
        """Late over early."""
        return self.late_ms / self.early_ms


def reach(policy: Policy, frames: Tensor, decisions: int) -> None:
    """Make so many decisions, of one code each."""
    policy.reset()
    for t in tqdm(range(decisions), desc=f"to decision {decisions}", disable=None):
        policy.act(frames[t % len(frames)], 1)


def timed(policy: Policy, frame: Tensor, budget: int) -> float:
    """Milliseconds of one decision, from the host's frame to the host's action."""
    start = time.perf_counter()
    policy.act(frame, budget)
    return 1e3 * (time.perf_counter() - start)


def compare(cfg: FlexLAMConfig, device: str, dtype: torch.dtype, late: int, budget: int, rounds: int) -> Steady:
    """Time both in turns, the order changing from round to round."""
    size = (64, 1, cfg.frame, cfg.frame, cfg.channels)
    frames = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    policies = [Policy(cfg, device=device, dtype=dtype) for _ in range(2)]
    for policy, decisions in zip(policies, (EARLY, late), strict=True):
        reach(policy, frames, decisions)
        policy.act(frames[0], budget)
    times: list[list[float]] = [[], []]
    for n in range(rounds):
        for which in (0, 1) if n % 2 else (1, 0):
            times[which].append(timed(policies[which], frames[n % len(frames)], budget))
    return Steady(*(float(torch.tensor(part).median()) for part in times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="of the policy")
    parser.add_argument("--decisions", type=int, default=5000, help="how many the late policy has made")
    parser.add_argument("--budget", type=int, default=16, help="codes of a timed decision")
    parser.add_argument("--rounds", type=int, default=40, help="timed decisions of each")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()
    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device.replace("auto", "cpu")
    cfg, dtype = FlexLAMConfig.preset(options.preset), getattr(torch, options.dtype)
    found = compare(cfg, device, dtype, options.decisions, options.budget, options.rounds)
    print(
        f"{options.preset} on {device}, k={options.budget}: {found.early_ms:.3f} ms about decision {EARLY}, "
        f"{found.late_ms:.3f} ms about decision {options.decisions}, {found.ratio():.3f} times"
    )
    if not found.ratio() <= 1.1:
        raise SystemExit("steady: expected the late decision to cost at most 10% more than the early one")


if __name__ == "__main__":
    main()
