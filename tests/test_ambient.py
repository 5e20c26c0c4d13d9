"""Every public entry gives the same whatever torch is set to around it, or refuses in one sentence."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ambient_cases import STATES, flat, op_calls
from native_cases import BUILT
from small import small_config
from torch import Tensor

import flexlam_fast as ff
from flexlam_fast.errors import InputError

OPS = op_calls()
every_state = pytest.mark.parametrize("state", STATES)
every_op = pytest.mark.parametrize("op", OPS)
BACKENDS = ["reference", *["native"] * BUILT]


def assert_same(got: Any, want: Any) -> None:
    for ours, plain in zip(flat(got), flat(want), strict=True):
        assert (ours.dtype, ours.device) == (plain.dtype, plain.device)
        assert torch.equal(ours, plain)


def test_every_op_has_a_call() -> None:
    assert {name.split()[0] for name in OPS} == set(ff.ops.__all__) - {"pack_translator"}


@every_state
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_op_gives_what_it_gives_without(state: str, backend: str, dtype: torch.dtype) -> None:
    for call, tensors in op_calls(dtype, backend).values():
        want = call(*tensors)
        with STATES[state]():
            got = call(*tensors)
        assert_same(got, want)


@every_op
def test_a_traced_op_computes_anew(op: str) -> None:
    call, tensors = OPS[op]
    others = tuple(t.flip(0) for t in tensors)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        if op == "choose_codes":
            with pytest.raises(InputError, match=r"^torch.jit.trace: expected no numbers to be drawn in plain PyTorch"):
                torch.jit.trace(call, tensors, check_trace=False)
            return
        traced = torch.jit.trace(call, tensors, check_trace=False)
        assert_same(traced(*others), call(*others))


@every_op
def test_an_op_under_vmap_is_that_of_every_part(op: str) -> None:
    call, tensors = OPS[op]
    others = tuple(t.flip(0) for t in tensors)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it loops
        batched = tuple(torch.stack(pair) for pair in zip(tensors, others, strict=True))
        if op == "write_pages":
            with pytest.raises(InputError, match=r"^write_pages: expected a call outside torch.func"):
                torch.func.vmap(call)(*batched)
            return
        got = flat(torch.func.vmap(call)(*batched))
    for i, given in enumerate((tensors, others)):
        for ours, plain in zip(got, flat(call(*given)), strict=True):
            torch.testing.assert_close(ours[i], plain)  # integers are equal; floats may come from the reference


def entries(backend: str, folder: Path) -> dict[str, Callable[[], Any]]:
    """Calls of every entry that keeps state, each on objects of its own; ``folder`` is for a checkpoint."""
    cfg = small_config()
    rng = np.random.default_rng(0)
    frames = torch.from_numpy(rng.integers(0, 256, (8, 2, 16, 16, 3), dtype=np.uint8))
    policy = ff.Policy(cfg, backend=backend, seed=3)
    policy.save_pretrained(folder)
    torch.manual_seed(1)
    lam, model = ff.LatentActionModel(cfg, backend), ff.SequenceModel(cfg)
    codes = torch.from_numpy(rng.integers(0, 20, (2, 7)))
    latents = lam.latents(codes[:, :4], 3).detach()

    def acts(acting: ff.Policy) -> Any:
        acting.reset(2, seed=4)
        decisions = [acting.act(f, budget=1 + i % 4, temperature=0.7 * (i % 2)) for i, f in enumerate(frames)]
        return [(d.codes, *d.actions) for d in decisions]

    def noise() -> torch.Generator:
        return torch.Generator().manual_seed(2)

    return {
        "act": lambda: acts(policy),
        "build and act": lambda: acts(ff.Policy(cfg, backend=backend, seed=3)),
        "load and act": lambda: acts(ff.Policy.from_pretrained(folder, backend=backend)),
        "imagine": lambda: (acts(policy), policy.imagine(policy.act(frames[0], budget=2)))[1],
        "encode": lambda: lam.encode(frames[0], frames[1]),
        "latents": lambda: lam.latents(codes[:, :4], 2).detach(),
        "decode": lambda: lam.decode(frames[0], latents, generator=noise()),
        "generate": lambda: model.generate(codes, 5),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@every_state
def test_an_entry_gives_what_it_gives_without(state: str, backend: str, tmp_path: Path) -> None:
    for call in entries(backend, tmp_path).values():
        want = call()
        with STATES[state]():
            got = call()
        assert_same(got, want)
        assert_same(call(), want)  # nothing stays behind


def frames_of(seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
@every_state
def test_an_episode_may_be_begun_in_one_state_and_gone_on_with_in_another(state: str, backend: str) -> None:
    plain, other = (ff.Policy(small_config(), backend=backend, seed=3) for _ in range(2))
    for inside in (True, False):
        for policy, ambient in ((plain, contextlib.nullcontext()), (other, STATES[state]() if inside else None)):
            with ambient or contextlib.nullcontext():
                policy.reset(1, capacity=2)
                policy.act(frames_of(0), budget=2)
                policy.open()
        want, got = (
            [p.act(torch.cat([frames_of(i)] * 2), budget=4, temperature=1.0).codes for i in range(6)]
            for p in (plain, other)
        )
        assert_same(got, want)
        for policy in (plain, other):
            policy.close([1])
            policy.cache.verify()


def test_models_built_in_inference_mode_are_models() -> None:
    cfg = small_config()
    with torch.inference_mode():
        torch.manual_seed(0)
        lam, model = ff.LatentActionModel(cfg), ff.SequenceModel(cfg)
    torch.manual_seed(0)
    usual_lam, usual_model = ff.LatentActionModel(cfg), ff.SequenceModel(cfg)
    codes = usual_lam.encode(frames_of(0), frames_of(1))
    assert_same(lam.encode(frames_of(0), frames_of(1)), codes)
    assert_same(lam.latents(codes, 2), usual_lam.latents(codes, 2))
    assert_same(model.generate(codes, 6), usual_model.generate(codes, 6))
    with torch.inference_mode():
        assert_same(model.generate(codes, 6), usual_model.generate(codes, 6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_models_built_with_another_default_dtype_work(dtype: torch.dtype) -> None:
    cfg = small_config()
    with STATES["default dtype fp64" if dtype == torch.float64 else "default dtype bf16"]():
        lam, model = ff.LatentActionModel(cfg), ff.SequenceModel(cfg)
    codes = lam.encode(frames_of(0), frames_of(1))
    assert lam.decode(frames_of(0), lam.latents(codes, 2)).dtype == torch.uint8
    assert model.generate(codes, 3).shape == (1, 3)


def test_what_keeps_state_is_neither_traced_nor_transformed() -> None:
    policy = ff.Policy(small_config())
    lam = ff.LatentActionModel(small_config())
    frames = frames_of(0)
    for run in (
        lambda: torch.jit.trace(lambda f: policy.act(f, budget=2).codes, frames, check_trace=False),
        lambda: torch.func.vmap(lambda f: policy.act(f, budget=2).codes)(frames[None]),
        lambda: torch.func.grad(lambda x: policy.act(frames, budget=2).actions.continuous.sum() + x)(torch.ones(())),
        lambda: torch.jit.trace(lambda a, b: lam.encode(a, b), (frames, frames), check_trace=False),
    ):
        with pytest.raises(InputError, match=r"expected a call outside torch.jit.trace and torch.func, got one inside"):
            run()
    assert policy.cache.t.tolist() == [-1]


def test_a_compiled_call_is_the_plain_one() -> None:
    plain, other = (ff.Policy(small_config(), seed=3) for _ in range(2))
    compiled = torch.compile(lambda f: other.act(f, budget=3).codes + 1, backend="eager")
    for i in range(4):
        assert_same(compiled(frames_of(i)), plain.act(frames_of(i), budget=3).codes + 1)
