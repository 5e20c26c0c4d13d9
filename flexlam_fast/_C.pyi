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
def draw_normal(
    key: int, step: int, streams: int, out: int, rows: int, count: int, threads: int, variant: str = ""
) -> None: ...
def draw_words(key: int, step: int, streams: int, words: int, rows: int) -> None: ...
def make_patches(
    sizes: Sequence[int],
    kind: int,
    now: int,
    following: int,
    noise: int,
    tau: int,
    out: int,
    type: int,
    gain: float,
    threads: int,
    variant: str = "",
) -> None: ...
def flow_loss(
    sizes: Sequence[int],
    out: int,
    now: int,
    following: int,
    noise: int,
    tau: int,
    error: int,
    type: int,
    floor: float,
    threads: int,
    variant: str = "",
) -> float: ...
def scale_error(error: int, out: int, count: int, scale: float, type: int, threads: int, variant: str = "") -> None: ...
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
def rotary_forward(
    q: Sequence[int],
    k: Sequence[int],
    q_weight: int,
    k_weight: int,
    angles: Sequence[int],
    sizes: Sequence[int],
    eps: float,
    q_out: int,
    k_out: int,
    type: int,
    threads: int,
    variant: str = "",
) -> None: ...
def rotary_backward(
    q: Sequence[int],
    k: Sequence[int],
    q_weight: int,
    k_weight: int,
    angles: Sequence[int],
    sizes: Sequence[int],
    eps: float,
    grad_q: Sequence[int],
    grad_k: Sequence[int],
    q_out: int,
    k_out: int,
    q_weight_out: int,
    k_weight_out: int,
    threads: int,
    variant: str = "",
) -> None: ...
def loss_forward(
    logits: int,
    target: int,
    kept: int,
    rows: int,
    codes: int,
    stride: int,
    ignored: int,
    type: int,
    threads: int,
    variant: str = "",
) -> tuple[float, int]: ...
def loss_backward(
    logits: int,
    target: int,
    kept: int,
    rows: int,
    codes: int,
    stride: int,
    ignored: int,
    type: int,
    scale: float,
    out: int,
    threads: int,
    variant: str = "",
) -> None: ...
def self_attention(
    tensors: Sequence[tuple[int, ...]],
    lse: int,
    mask: int,
    sizes: Sequence[int],
    type: int,
    causal: bool,
    scale: float,
    threads: int,
    variant: str = "",
) -> None: ...
def self_attention_backward(
    tensors: Sequence[tuple[int, ...]],
    grads: Sequence[tuple[int, ...]],
    lse: int,
    mask: int,
    sizes: Sequence[int],
    type: int,
    causal: bool,
    scale: float,
    threads: int,
    variant: str = "",
) -> None: ...

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
