"""The extension of ``csrc/``; tensors go in as addresses, checked by ``flexlam_fast.ops``."""

from collections.abc import Sequence
from typing import Literal, TypedDict

class BuildInfo(TypedDict):
    compiler: str
    flags: str
    cxx_standard: int
    pybind11: str
    threads: bool
    variants: list[str]
    cuda: str | Literal[False]

def cpu_features() -> dict[str, bool]: ...
def build_info() -> BuildInfo: ...
def chunk_tokens(slots: int, dim: int) -> int: ...
def sample_prefix(seed: int, offset: int, edges: int, slots: int, keep: int, blocks: int) -> None: ...
def linear(
    x: int,
    norm: int,
    weight: int,
    residual: int,
    out: int,
    rows: int,
    inner: int,
    outs: int,
    type: int,
    gated: bool,
    fp32_out: bool,
    eps: float,
    threads: int,
    variant: str = "",
) -> None: ...
def page_write(
    qkv: int,
    q_norm: int,
    k_norm: int,
    positions: int,
    rows: int,
    k: int,
    v: int,
    q: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    pool: int,
    type: int,
    theta: float,
    eps: float,
    threads: int,
    variant: str = "",
) -> None: ...
def page_attend(
    q: int,
    k: int,
    v: int,
    table: int,
    context: int,
    start: int,
    out: int,
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    page: int,
    entries: int,
    pages: int,
    type: int,
    threads: int,
    variant: str = "",
) -> None: ...
def cuda_partials() -> int: ...
def cuda_engine_refusal(
    hidden: int,
    inner: int,
    heads: int,
    kv_heads: int,
    dim: int,
    codes: int,
    type: int,
    pages: int,
    page: int,
    entries: int,
) -> str: ...
def takes_tiles(dim: int, page: int, type: int) -> bool: ...
def norm_rows(
    x: int, weight: int, out: int, rows: int, width: int, type: int, eps: float, threads: int, variant: str = ""
) -> None: ...
def swiglu_rows(x: int, out: int, rows: int, inner: int, type: int, threads: int, variant: str = "") -> None: ...

_Place = tuple[int, int, int, int]
_Size = tuple[int, int, int]

def row_norm(
    x: _Place,
    scale: _Place,
    shift: _Place,
    out: _Place,
    stats: int,
    size: _Size,
    eps: float,
    center: bool,
    one: bool,
    threads: int,
    variant: str = "",
) -> None: ...
def row_norm_backward(
    grad: _Place,
    x: _Place,
    scale: _Place,
    stats: int,
    dx: _Place,
    dscale: _Place,
    dshift: _Place,
    size: _Size,
    center: bool,
    one: bool,
    threads: int,
    variant: str = "",
) -> None: ...
def gate_add(x: _Place, y: _Place, gate: _Place, out: _Place, size: _Size, threads: int, variant: str = "") -> None: ...
def gate_add_backward(
    grad: _Place, y: _Place, gate: _Place, dy: _Place, dgate: _Place, size: _Size, threads: int, variant: str = ""
) -> None: ...
def gelu(
    grad: int, x: int, out: int, rows: int, width: int, last: int, type: int, threads: int, variant: str = ""
) -> None: ...
def swiglu(
    grad: int,
    gate: int,
    up: int,
    out: int,
    other: int,
    rows: int,
    width: int,
    last: int,
    gate_row: int,
    up_row: int,
    type: int,
    threads: int,
    variant: str = "",
) -> None: ...

class EncoderEngine:
    def __init__(
        self,
        layers: Sequence[Sequence[int]],
        norm: int,
        norm_bias: int,
        width: int,
        heads: int,
        inner: int,
        eps: float,
    ) -> None: ...
    def takes(self, tokens: int) -> bool: ...
    def run(self, x: int, out: int, batch: int, tokens: int, keep: int, threads: int) -> None: ...

class SequenceEngine:
    def __init__(
        self,
        layers: Sequence[Sequence[int]],
        embedding: int,
        place: int,
        norm: int,
        head: int,
        hidden: int,
        inner: int,
        heads: int,
        kv_heads: int,
        dim: int,
        codes: int,
        slots: int,
        theta: float,
        eps: float,
        type: int,
    ) -> None: ...
    def takes(self, tokens: int, page: int, type: int) -> bool: ...
    def append(
        self,
        x: int,
        k: int,
        v: int,
        table: int,
        context: int,
        start: int,
        rows: int,
        positions: int,
        logits: int,
        batch: int,
        tokens: int,
        page: int,
        entries: int,
        pages: int,
        type: int,
        threads: int,
    ) -> None: ...
    def generate(
        self,
        k: int,
        v: int,
        table: int,
        context: int,
        starts: int,
        rows: int,
        positions: int,
        first: int,
        noise: int,
        given: int,
        chosen: int,
        logits: int,
        batch: int,
        budget: int,
        page: int,
        entries: int,
        pages: int,
        top_k: int,
        inverse: float,
        type: int,
        threads: int,
        variant: str = "",
    ) -> None: ...

class CudaSequenceEngine:
    def __init__(
        self,
        layers: Sequence[Sequence[int]],
        embedding: int,
        place: int,
        norm: int,
        head: int,
        hidden: int,
        inner: int,
        heads: int,
        kv_heads: int,
        dim: int,
        codes: int,
        slots: int,
        theta: float,
        eps: float,
        type: int,
        pages: int,
        page: int,
        entries: int,
    ) -> None: ...
    def generate(
        self,
        k: int,
        v: int,
        table: int,
        context: int,
        starts: int,
        rows: int,
        positions: int,
        first: int,
        noise: int,
        given: int,
        chosen: int,
        logits: int,
        batch: int,
        budget: int,
        page: int,
        entries: int,
        pages: int,
        top_k: int,
        inverse: float,
        type: int,
        room: int,
        stream: int,
    ) -> None: ...
    def room(self) -> int: ...
    def blocks(self) -> int: ...
    def check(self) -> None: ...

class LevelPattern:
    def __init__(
        self, levels: Sequence[int], thresholds: Sequence[float], half: Sequence[float], shift: Sequence[float]
    ) -> None: ...
    def forward(
        self,
        z: int,
        latents: int,
        codes: int,
        tokens: int,
        type: int,
        slots: int,
        keep: int,
        null: int,
        threads: int,
        variant: str = "",
    ) -> None: ...
    def backward(
        self,
        grad: int,
        z: int,
        grad_z: int,
        grad_null: int,
        tokens: int,
        type: int,
        slots: int,
        keep: int,
        threads: int,
        variant: str = "",
    ) -> None: ...
    def codes_to_latents(
        self, codes: int, latents: int, tokens: int, slots: int, keep: int, null: int, threads: int
    ) -> None: ...

class CudaLevels:
    def __init__(self, pattern: LevelPattern) -> None: ...
    def forward(
        self,
        z: int,
        latents: int,
        codes: int,
        tokens: int,
        type: int,
        slots: int,
        keep: int,
        null: int,
        stream: int,
    ) -> None: ...
    def backward(
        self,
        grad: int,
        z: int,
        grad_z: int,
        grad_null: int,
        tokens: int,
        type: int,
        slots: int,
        keep: int,
        stream: int,
    ) -> None: ...
