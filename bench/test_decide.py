"""One decision of the ``dmlab`` policy beside ``transformers`` Qwen3 of the same sizes and weights.

Ours is everything (paper B.6): host uint8 frames in, host actions out, full windows. The peers are the sequence model
alone: a 128-token append to 2,368 cached tokens, then k - 1 passes of one token. Our own reference path is beside them.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from measure import in_turns
from peers import REFERENCE, Compiler
from rows import Results, Work
from torch import Tensor

from flexlam_fast.backend import NATIVE, probe
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.layers import normalise
from flexlam_fast.policy import Policy
from flexlam_fast.sequence.layout import OBSERVATION, history_layout
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.native import Native, NativeBlock

pytest.importorskip("transformers")
from qwen import APPEND, CONTEXT, EAGER, STATIC, QwenPeer, StaticPeer, cast, qwen_of

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
#: Beyond one session a CPU takes seconds a decision; the ids are a GPU's.
BATCHES = (1, 8, 64, 256) if ON_GPU else (1,)
CASES = [pytest.param(b, k, DTYPE, id=f"decide/dmlab/b{b}/k{k}") for b in BATCHES for k in (4, 16, 64)]
if not ON_GPU:
    CASES += [pytest.param(1, k, torch.bfloat16, id=f"decide/dmlab/b1/k{k}/bf16") for k in (4, 16, 64)]
OP_BY_OP, EAGER_BF16 = "flexlam_fast op by op", f"{EAGER}, bf16"
#: A block of codes in one launch, which takes few sessions; its side is named after the backend.
PERSISTENT, MAX_PERSISTENT = "flexlam_fast backend native", 8


class Bench(NamedTuple):
    """Ours and others that have the same weights and full windows, and frames to act on.

    ``op_by_op`` is ours without the call that generates a whole block, None where there is no such call; ``persistent``
    is ours by the native backend on a GPU, None where that is what ours is or does not run; ``same`` is the peer in the
    dtype of ours, None where that is the peer's own.
    """

    policy: Policy
    reference: Policy
    op_by_op: Policy | None
    persistent: Policy | None
    peer: QwenPeer
    same: QwenPeer | None
    frames: Tensor


@pytest.fixture(scope="module")
def qwen(results: Results) -> Any:
    """The peer's model, after checks in fp32 that ours is the same and that its decisions are right."""
    cfg, device = FlexLAMConfig.preset("dmlab"), results.device
    model = qwen_of(cfg, device, torch.float32)
    policy = loaded(model, device, torch.float32, "auto")
    frames = torch.randint(0, 256, (42, 1, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    check_same_model(policy, QwenPeer(model))
    check_decision(policy, frames)
    return cast(model, device, DTYPE)


def op_by_op(policy: Policy) -> Policy:
    """A policy whose codes come from single ops."""
    policy.stages = policy.stages._replace(runner=Native(policy.sequence))
    return policy


def loaded(model: Any, device: torch.device, dtype: torch.dtype, backend: str) -> Policy:
    """A policy whose sequence model has the peer's weights."""
    policy = Policy(FlexLAMConfig.preset("dmlab"), device=device, dtype=dtype, backend=backend)
    policy.sequence.load_state_dict(SequenceModel.from_qwen3(model).state_dict())
    return policy


@pytest.fixture(scope="module")
def qwen_compiler(compiler: Compiler) -> Compiler:
    """Twelve layers take longer to compile than one op."""
    return Compiler(4 * compiler.limit)


_made: dict[tuple[int, torch.dtype], Bench] = {}


def bench_of(model: Any, device: torch.device, batch: int, dtype: torch.dtype) -> Bench:
    """Policies and peers for a batch size; only one is kept, because its caches may fill the device."""
    if (batch, dtype) not in _made:
        _made.clear()
        frames = torch.randint(
            0, 256, (batch, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
        )
        ours, reference = (loaded(model, device, dtype, backend) for backend in ("auto", "reference"))
        blocks = isinstance(ours.stages.runner, NativeBlock)
        single = op_by_op(loaded(model, device, dtype, "auto")) if blocks else None
        persistent = native_on_gpu(model, device, dtype, ours) if batch <= MAX_PERSISTENT else None
        for policy in (ours, reference, single, persistent):
            if policy is not None:
                policy.reset(batch)
                for _ in range(policy.cfg.sequence.window + 8):
                    policy.act(frames, 1)
        same = None if dtype == DTYPE else QwenPeer(cast(copy.deepcopy(model), device, dtype), batch)
        _made[batch, dtype] = Bench(ours, reference, single, persistent, QwenPeer(model, batch), same, frames)
    return _made[batch, dtype]


def native_on_gpu(model: Any, device: torch.device, dtype: torch.dtype, ours: Policy) -> Policy | None:
    """The policy whose blocks of codes are one launch, where that runs and is not what ``auto`` took already."""
    runs = any(status.name == NATIVE and status.available for status in probe(device))
    if device.type != "cuda" or ours.backend.name == NATIVE or not runs:
        return None
    return loaded(model, device, dtype, NATIVE)


@torch.no_grad()
def check_same_model(policy: Policy, peer: QwenPeer) -> None:
    """Both sequence models give the same codes after the peer's context, ours without any cache."""
    expected = peer.decide(4).to(policy.device)
    tail = policy.sequence.embed_codes(expected[:, :-1], torch.arange(3, device=policy.device))
    x = torch.cat([peer.x, tail], dim=1)
    logits = policy.sequence.logits(policy.sequence(x, torch.arange(x.shape[1], device=policy.device))[:, -4:])
    assert torch.equal(logits.argmax(-1), expected)


@torch.no_grad()
def check_decision(policy: Policy, frames: Tensor) -> None:
    """64 codes with a full window equal those of the dense mask over the whole history."""
    policy.reset()
    for frame in frames[:-1]:
        policy.act(frame, 1)
    codes = policy.act(frames[-1], 64).codes.to(policy.device)
    pixels, device = normalise(frames[:, 0].to(policy.device)), policy.device
    blocks = policy.lam.encode(pixels[:-1], pixels[1:])
    layout = history_layout(policy.cfg, len(frames), 0, "last")
    parts = []
    for s in layout.segments:
        block = codes[:, : s.length] if s.scratch else blocks[s.frame : s.frame + 1] if s.frame < len(blocks) else codes
        slots = torch.arange(s.length, device=device)
        seen = policy.sequence.embed_frames(pixels[s.frame : s.frame + 1]) if s.kind == OBSERVATION else None
        parts.append(policy.sequence.embed_codes(block, slots) if seen is None else seen)
    hidden = policy.sequence(torch.cat(parts, dim=1), layout.positions.to(device), layout.mask.to(device))
    logits = policy.sequence.logits(hidden[0, layout.source[-64:].to(device)])
    assert int(layout.mask[layout.source[-64]].sum()) == CONTEXT
    best = logits.topk(2).values
    clear = best[:, 0] - best[:, 1] > 1e-3 * best[:, 0].abs()
    assert int(clear.sum()) >= 56
    assert torch.equal(logits.argmax(-1)[clear], codes[0].long()[clear])


def least_work(model: SequenceModel, batch: int, k: int) -> Work:
    """What the sequence model cannot help but do for ``k`` codes of ``batch`` sessions.

    Each pass reads the weights of blocks and head once, and the keys and values of every session's context; every token
    that enters meets the blocks' weights and the context, every code the head.
    """
    seq, weight = model.cfg.sequence, model.head.weight
    blocks = sum(p.numel() for p in (*model.blocks.parameters(), *model.norm.parameters()))
    read = blocks + weight.numel() + batch * 2 * CONTEXT * seq.layers * seq.kv_heads * seq.head_dim
    entering = batch * (APPEND + k - 1)
    operations = entering * (2 * blocks + 4 * CONTEXT * seq.layers * seq.heads * seq.head_dim)
    bytes_of_a_pass = read * weight.element_size()
    return Work(k * bytes_of_a_pass, operations + 2 * batch * k * weight.numel(), weight.dtype, bytes_of_a_pass)


@pytest.mark.parametrize(("batch", "k", "dtype"), CASES)
def test_decide(
    benchmark: Any,
    request: pytest.FixtureRequest,
    results: Results,
    rounds: int,
    qwen_compiler: Compiler,
    qwen: Any,
    batch: int,
    k: int,
    dtype: torch.dtype,
) -> None:
    policy, reference, single, persistent, peer, same, frames = bench_of(qwen, results.device, batch, dtype)
    peers: dict[str, Any] = {REFERENCE: lambda: reference.act(frames, k), EAGER: lambda: peer.decide(k)}
    if single is not None:
        peers[OP_BY_OP] = lambda: single.act(frames, k)
    if persistent is not None:
        peers[PERSISTENT] = lambda: persistent.act(frames, k)
    if same is not None:
        peers[EAGER_BF16] = lambda: same.decide(k)
    without = "no compiled peer: it is for CUDA graphs, which a CPU has not"
    if ON_GPU:
        without = qwen_compiler.add(peers, STATIC, lambda: static_side(qwen, batch, k))
    timing = in_turns(benchmark, lambda: policy.act(frames, k), peers, results.machine.wall, rounds)
    graphs = ", CUDA graphs" if policy.graphs else ""
    note = (
        f"{name_of(dtype)}, {torch.get_num_threads()} threads, backend {policy.backend.name}{graphs}; ours is a whole "
        "decision, uint8 frames in, actions out; the Qwen3 peers are their sequence model alone, in "
        f"{name_of(DTYPE)} unless they say otherwise, {APPEND} tokens appended to make {CONTEXT}; the floor is that of "
        "the sequence model alone: weights, keys and values read once per code, or every product done once"
    )
    work = least_work(policy.sequence, batch, k)
    note = f"{note}; {without}" if without else note
    results.add(benchmark, request.node.callspec.id, timing, work, note, memory_bound=False)


def name_of(dtype: torch.dtype) -> str:
    """A dtype as one says it."""
    return str(dtype).removeprefix("torch.")


def static_side(model: Any, batch: int, k: int) -> Any:
    """The compiled peer's side of a case, which has given the same codes as the eager one."""
    static = StaticPeer(model, batch)
    eager, compiled = QwenPeer(model, batch).decide(k), static.decide(k)
    same = float((eager[:, 0] == compiled[:, 0]).float().mean())  # later codes follow the first that differs
    assert same > 0.9, f"expected the first codes of the compiled peer to be the eager one's, got {same:.0%}"
    return lambda: static.decide(k)
