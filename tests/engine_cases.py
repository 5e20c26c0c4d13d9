"""The persistent kernel's phases run on the host by ``tests/native``: how they are compiled, and used as a way."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from small import small_config
from torch import Tensor

from flexlam_fast.config import BottleneckConfig, FlexLAMConfig, SequenceConfig
from flexlam_fast.ops.block import ModelTensors
from flexlam_fast.ops.sampling import reciprocal
from flexlam_fast.presets import TINY
from flexlam_fast.sequence.cache import PagedCache, Placement
from flexlam_fast.sequence.eager import Eager
from flexlam_fast.sequence.layers import Layer, pack, tensors_of
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.sampling import Sampling

ROOT = Path(__file__).resolve().parents[1]
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler for the emulation")
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
PATIENCE = 1 << 40
SMALL = small_config()  # two heads that share one of keys, of 16
#: Pages of 64 tokens, heads of 64, two to a head of keys; several splits, the last of them not whole.
WIDE = dataclasses.replace(
    FlexLAMConfig(),
    bottleneck=BottleneckConfig(levels=(5, 4, 3)),
    sequence=SequenceConfig(hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, window=4, stride=2),
)
CONFIGS = {"small": SMALL, "tiny": TINY, "wide": WIDE}


def _fields(kind: object, names: str) -> list[tuple[str, object]]:
    return [(name, kind) for name in names.split()]


class Shape(ctypes.Structure):
    """``ModelShape`` of csrc/engine.h."""

    _fields_ = [
        *_fields(ctypes.c_int64, "hidden inner heads kv_heads dim codes slots"),
        ("theta", ctypes.c_double), ("eps", ctypes.c_float), ("type", ctypes.c_int),
    ]  # fmt: skip


class Block(ctypes.Structure):
    """``BlockArgs`` of csrc/engine.h."""

    _fields_ = [
        *_fields(ctypes.c_void_p, "k v table context starts rows positions first noise given chosen logits"),
        *_fields(ctypes.c_int64, "batch budget page entries pages top_k"),
        ("inverse", ctypes.c_float), ("type", ctypes.c_int),
    ]  # fmt: skip


class Call(ctypes.Structure):
    """``Call`` of tests/native/emulate.cpp."""

    _fields_ = [
        ("shape", Shape), *_fields(ctypes.c_void_p, "layers embedding place norm head frequency"), ("block", Block),
        ("state", ctypes.c_void_p), *_fields(ctypes.c_int64, "depth blocks present patience backwards"),
    ]  # fmt: skip


@functools.cache
def emulation() -> ctypes.CDLL:
    """The phases compiled for this host."""
    assert COMPILER is not None
    out = Path(tempfile.mkdtemp()) / "emulation.so"
    sources = [str(ROOT / "tests" / "native" / "emulate.cpp"), str(ROOT / "csrc" / "engine_plan.cpp")]
    # _longjmp changes fibers here, which a fortified one takes for a stack that has been left
    flags = ["-std=c++17", "-O2", "-pthread", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas"]
    done = subprocess.run([COMPILER, *flags, *sources, "-o", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    library = ctypes.CDLL(str(out))
    library.flexlam_refusal.restype = ctypes.c_char_p
    library.flexlam_refusal.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    shutil.rmtree(out.parent)
    return library


def shape_of(weights: ModelTensors, theta: float, eps: float) -> Shape:
    """Sizes of a model."""
    layer, (codes, hidden) = weights.layers[0], weights.head.shape
    dim = len(layer.q_norm)
    heads = layer.out.shape[1] // dim
    kv_heads = (len(layer.qkv) // dim - heads) // 2
    slots = 0 if weights.place is None else len(weights.place)
    kind = KINDS[weights.head.dtype]
    return Shape(hidden, layer.down.shape[1], heads, kv_heads, dim, codes, slots, theta, eps, kind)


class Emulated(Eager):
    """The model's own forward for what is observed, and the emulated kernel for a block of codes.

    ``blocks`` is how many the grid has, of which ``present`` come; ``lost`` counts launches that were given up.
    """

    def __init__(self, model: SequenceModel, blocks: int = 3, backwards: bool = False) -> None:
        super().__init__(model)
        self.blocks, self.present, self.backwards, self.patience = blocks, blocks, backwards, PATIENCE
        self.state, self.lost = torch.zeros(2, dtype=torch.int64), 0
        self.packed: list[Layer] = []

    @property
    def arrived(self) -> int:
        """What the barriers' counter stands at."""
        return int(self.state[0])

    def block(
        self,
        cache: PagedCache,
        place: Placement,
        first: Tensor,
        k: int,
        sampling: Sampling | None,
        *,
        given: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> Tensor:
        """Codes int32 ``[B, k]`` at ``place``, from the logits ``[B, C]`` of the first."""
        self.packed, seq = pack(self.model, self.packed), self.model.cfg.sequence
        weights, batch = tensors_of(self.model, self.packed), len(first)
        drawn = None if sampling is None else sampling.prepared(k, first.shape[1])
        starts = torch.arange(k, dtype=torch.int32).unsqueeze(1).expand(k, batch)
        by_slot = starts, cache.rows(place)[:, :k].t(), place.positions[:, :k].t()
        chosen = torch.full((batch, k), -1, dtype=torch.int32)
        parts = [place.table, place.context, *by_slot, first.float(), None if drawn is None else drawn.noise, given]
        held = [None if t is None else t.contiguous() for t in parts]
        frequency = seq.rope_theta ** (-2 * torch.arange(seq.head_dim // 2, dtype=torch.float64) / seq.head_dim)
        table = torch.tensor([[t.data_ptr() for t in layer] for layer in weights.layers])
        pointers = [None if t is None else t.data_ptr() for t in (cache.k, cache.v, *held, chosen, logits)]
        heat = (0, 0.0) if sampling is None else (sampling.top_k or 0, reciprocal(sampling.temperature))
        call = Call(
            shape_of(weights, seq.rope_theta, seq.rms_eps), table.data_ptr(), weights.embedding.data_ptr(),
            None if weights.place is None else weights.place.data_ptr(), weights.norm.data_ptr(),
            weights.head.data_ptr(), frequency.data_ptr(),
            Block(*pointers, batch, k, cache.page, place.table.shape[1], cache.k.shape[1], *heat, KINDS[cache.k.dtype]),
            self.state.data_ptr(), len(weights.layers), self.blocks, self.present, self.patience, self.backwards,
        )  # fmt: skip
        self.lost += emulation().flexlam_emulate(ctypes.byref(call))
        return chosen
