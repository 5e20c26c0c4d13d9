"""Who ours is timed against: names, peers under ``torch.compile``, and which backends of ours can run here."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from flexlam_fast import backend as backends

VQ = "vector_quantize_pytorch FSQ"
COMPILED = f"{VQ}, torch.compile"
REFERENCE = "flexlam_fast reference"


class Compiler:
    """Puts peers under ``torch.compile`` until one takes too long, which on a slow CPU the first may do.

    Args:
        limit: seconds to compile and run a peer once; 0 for no such peers.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.left_out = "" if limit > 0 else "not asked for"

    def add(self, peers: dict[str, Callable[[], object]], name: str, make: Callable[[], Callable[[], object]]) -> str:
        """Add the side that ``make()`` compiles to ``peers`` as ``name``; return "", or why it was left out."""
        if not self.left_out:
            torch.compiler.reset()  # else the ninth shape of one function would fall back to eager
            start = time.perf_counter()
            try:
                peer = make()
                peer()
            except Exception as error:  # a missing compiler, a driver: its own words say which
                self.left_out = f"it failed here with {type(error).__name__}"
                return self.note()
            took = time.perf_counter() - start
            if took <= self.limit:
                peers[name] = peer
                return ""
            self.left_out = f"{took:.0f} s to compile, of {self.limit:g}"
        return self.note()

    def note(self) -> str:
        """Say that the peer is missing, and why."""
        return f"no torch.compile peer: {self.left_out}"


def fast_backends(device: torch.device) -> list[str]:
    """Return the backends of ours that can run on ``device``, fastest first, without the reference."""
    return [s.name for s in backends.probe(device) if s.available and s.name != backends.REFERENCE]
