"""Random decisions, resets, openings and closings, as many as one likes: ``python bench/soak.py --decisions 200000``.

After every call the cache's books are checked against the window rule, and pages that are free or taken must add up. In
the end everything is closed, and what the process holds is compared with what it held after the first fifth.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import resource
import time
from pathlib import Path
from typing import NamedTuple

import torch

from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.policy import Policy


class Soaked(NamedTuple):
    """What a soak saw: decisions (one of one session is one), calls, openings, resets; drift of memory in bytes."""

    decisions: int
    calls: int
    opened: int
    reset: int
    drift: int


def held() -> int:
    """Resident bytes of this process, after handing back what nobody uses."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


def soak(cfg: FlexLAMConfig, decisions: int, capacity: int, seed: int) -> Soaked:
    """Make at least so many decisions in a pool of ``capacity`` sessions.

    Raises:
        CacheError: the books are wrong.
        AssertionError: pages got lost.
    """
    draw, policy = random.Random(seed), Policy(cfg)
    policy.reset(capacity // 2, capacity=capacity)
    size, slots = cfg.frame, cfg.bottleneck.slots
    frames = torch.randint(0, 256, (64, size, size, cfg.channels), dtype=torch.uint8)
    made = calls = opened = resets = early = 0
    while made < decisions:
        if early == 0 and made > decisions // 5:
            early = held()
        now = policy.cache.opened
        if now and draw.random() < 0.1:
            policy.close(draw.sample(now, draw.randint(1, max(1, len(now) // 4))))
        if policy.cache.free and draw.random() < 0.2:
            opened += len(policy.open(draw.randint(1, len(policy.cache.free))))
        now = policy.cache.opened
        if now and draw.random() < 0.1:
            resets += 1
            policy.reset(sessions=draw.sample(now, 1))
        acting = draw.sample(now, draw.randint(len(now) // 2, len(now)))
        if acting:
            policy.act(frames[torch.randint(64, (len(acting),))], draw.randint(1, slots), sessions=acting)
            made, calls = made + len(acting), calls + 1
        policy.cache.verify()
        free, taken = len(policy.cache.free), len(policy.cache.opened)
        assert free + taken == capacity, f"expected {capacity} sessions free or open, got {free} and {taken}"
    policy.close(policy.cache.opened)
    policy.cache.verify()
    assert len(policy.cache.free) == capacity, "expected every page back"
    return Soaked(made, calls, opened, resets, held() - early if early else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decisions", type=int, default=200_000, help="how many, over all sessions")
    parser.add_argument("--capacity", type=int, default=48, help="sessions that the pool has room for")
    parser.add_argument("--preset", default="tiny", help="of the model")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn")
    options = parser.parse_args()
    began = time.perf_counter()
    found = soak(FlexLAMConfig.preset(options.preset), options.decisions, options.capacity, options.seed)
    print(
        f"{found.decisions} decisions in {found.calls} calls, {found.opened} sessions opened, {found.reset} resets, in "
        f"{time.perf_counter() - began:.0f} s: the books were right after every call, every page came back, memory "
        f"grew by {found.drift / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    main()
