"""Codes to action scores in one op: its reference against the modules, and the Triton kernel against the reference."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexlam_fast.backend import probe
from flexlam_fast.config import BottleneckConfig, FlexLAMConfig, TranslatorConfig
from flexlam_fast.errors import BackendError, BudgetError, InputError
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.testing import assert_within_budget
from flexlam_fast.translator import Translator

op = importlib.import_module("flexlam_fast.ops.translate")  # the package has a function of that name

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
L = (8, 5, 5, 5)
pytest.importorskip("triton")


class Case:
    """A translator with random weights everywhere, also where training starts from zeros and ones, and its inputs."""

    def __init__(self, dtype: torch.dtype, batch: int = 5, slots: int = 6, levels: tuple[int, ...] = L, seed: int = 0,
                 wide: int = 64, hidden: int = 48, depth: int = 2, discrete: tuple[int, ...] = (3, 5),
                 continuous: int = 2) -> None:  # fmt: skip
        torch.manual_seed(seed)
        sizes = TranslatorConfig(depth=depth, hidden=hidden, wide=wide, discrete=discrete, continuous=continuous)
        bottleneck = BottleneckConfig(levels=levels, slots=slots)
        self.cfg = dataclasses.replace(FlexLAMConfig.preset("tiny"), bottleneck=bottleneck, translator=sizes)
        self.module = Translator(self.cfg).eval().requires_grad_(False)
        for parameter in self.module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        self.module.to(DEVICE, dtype)
        self.weights = op.pack_translator(self.module.state_dict())
        self.codes = torch.randint(0, math.prod(levels), (batch, slots), dtype=torch.int32).to(DEVICE)
        # what the kernel reads as fp32 is rounded here once, as the error budget asks
        self.null = torch.randn(len(levels)).to(dtype).float().to(DEVICE)
        self.previous = torch.randn(batch, sizes.action_dim).to(dtype).float().to(DEVICE)
        self.levels, self.slots, self.dtype = levels, slots, dtype

    def run(
        self, k: int, codes: Tensor | None = None, previous: Tensor | None = None, backend: str = "triton"
    ) -> Tensor:
        codes, previous = self.codes if codes is None else codes, self.previous if previous is None else previous
        return op.translate(codes, k, self.levels, self.null, previous, self.weights, slots=self.slots, backend=backend)

    def check(self, actual: Tensor, k: int, codes: Tensor | None = None) -> None:
        def plain(codes: Tensor, null: Tensor, previous: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
            packed = op.TranslatorWeights(*weights)
            return op.translate_reference(codes, k, self.levels, null, previous, packed, self.slots)

        args = (self.codes if codes is None else codes, self.null, self.previous, tuple(self.weights))
        assert_within_budget(actual, plain, *args, working_dtype=self.dtype, name=f"k={k}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_is_the_policys_own_computation(dtype: torch.dtype) -> None:
    case = Case(dtype)
    lam = LatentActionModel(case.cfg, "reference").to(DEVICE)
    with torch.no_grad():
        lam.bottleneck.null.copy_(case.null)
    for k in range(case.slots + 1):
        with torch.no_grad():
            latents = lam.latents(case.codes, k).to(dtype)
            out = case.module(latents, case.previous)
        theirs = torch.cat([*out.logits, out.continuous], dim=1)
        ours = case.run(k, backend="reference")
        assert ours.dtype == torch.float32
        # the packed stem is a transposed view, for which the matrix product may take another order of sums
        ulp = torch.finfo(dtype).eps
        assert torch.allclose(ours, theirs, rtol=4 * ulp, atol=4 * ulp * float(theirs.abs().max())), k


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_budget_is_within_the_error_budget(dtype: torch.dtype) -> None:
    case = Case(dtype)
    for k in range(case.slots + 1):
        out = case.run(k)
        assert out.dtype == torch.float32
        assert out.shape == (5, 10)
        case.check(out, k)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(batch=1, wide=512, hidden=96, depth=5, slots=64, discrete=(15,), continuous=0),  # dmlab
        dict(batch=17, wide=40, hidden=20, depth=1, discrete=(2,), continuous=0),  # odd sizes, two programs
        dict(batch=33, wide=33, hidden=7, slots=5, levels=(7, 5, 5, 5, 5), discrete=(), continuous=21),
        dict(batch=16, wide=16, hidden=16, slots=1, levels=(4,), depth=3),
        dict(batch=2, wide=256, hidden=33, slots=3, levels=(3, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_size(dtype: torch.dtype, sizes: dict[str, Any]) -> None:
    case = Case(dtype, **sizes)
    for k in {0, case.slots // 2, case.slots}:
        case.check(case.run(k), k)


@settings(max_examples=12)
@given(k=st.integers(0, 6), extra=st.integers(0, 3), seed=st.integers(0, 99), wide_codes=st.booleans())
def test_codes_at_or_beyond_k_change_nothing_by_a_bit(k: int, extra: int, seed: int, wide_codes: bool) -> None:
    case = Case(torch.bfloat16, seed=seed % 3, depth=1)
    expected = case.run(k)
    generator = torch.Generator().manual_seed(seed)
    junk = torch.randint(-(2**31), 2**31 - 1, (5, k + extra), generator=generator, dtype=torch.int64).to(DEVICE)
    junk[:, :k] = case.codes[:, :k]
    codes = junk if wide_codes else junk.to(torch.int32)
    for backend in ("triton", "reference"):
        assert torch.equal(case.run(k, codes, backend=backend), case.run(k, backend=backend))
    assert torch.equal(case.run(k, codes), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    case = Case(dtype, batch=20)
    full = case.run(4)
    for i in (0, 7, 15, 16, 19):
        assert torch.equal(case.run(4, case.codes[i : i + 1], case.previous[i : i + 1])[0], full[i])
    other, previous = case.codes.flip(1).contiguous(), -case.previous
    other[7], previous[7] = case.codes[7], case.previous[7]
    changed = case.run(4, other, previous)
    assert torch.equal(changed[7], full[7])
    assert not torch.equal(changed[8], full[8])


def test_retained_codes_the_previous_action_and_the_null_all_matter() -> None:
    case = Case(torch.float32)
    plain = case.run(3)
    for slot in range(3):
        codes = case.codes.clone()
        codes[:, slot] = (codes[:, slot] + 1) % 1000
        assert not torch.isclose(case.run(3, codes), plain).all(1).any()
    assert not torch.isclose(case.run(3, previous=case.previous + 1), plain).all(1).any()
    case.null = case.null + 1
    assert not torch.isclose(case.run(3), plain).all(1).any()


def test_strided_and_shifted_inputs_and_empty_batches() -> None:
    case = Case(torch.bfloat16)
    expected = case.run(4)
    pages = torch.full((5, 13), 10**9, dtype=torch.int32, device=DEVICE)
    pages[:, 3:7] = case.codes[:, :4]
    doubled = case.codes.repeat_interleave(2, 1)[:, ::2]
    column_major = case.codes.t().contiguous().t()
    for codes in (pages[:, 3:7], doubled, column_major):
        assert torch.equal(case.run(4, codes), expected)
    padded = torch.cat([case.previous, case.previous], 1)[:, :10]
    assert torch.equal(case.run(4, previous=padded), expected)
    assert torch.equal(case.run(4, previous=case.previous.to(torch.bfloat16)), expected), "it was rounded to this"
    for backend in ("triton", "reference"):
        empty = case.run(4, case.codes[:0], case.previous[:0], backend)
        assert (empty.shape, empty.dtype) == ((0, 10), torch.float32)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(k=7), r"k: expected an integer in 0..6, got 7"),
        (dict(k=-1), r"k: expected an integer in 0..6, got -1"),
        (dict(k=True), r"k: expected an integer in 0..6, got True"),
        (dict(slots=0), r"slots: expected an integer in 1..2147483647, got 0"),
        (dict(slots=7), r"weights.stem: expected \[38,64\] float32 \w+, got \[34,64\]"),
        (
            dict(codes=torch.zeros(5, dtype=torch.int32)),
            rf"codes: expected \[B,n\] int32 or int64, got \[5\] int32 {DEVICE}",
        ),
        (dict(codes=torch.zeros(5, 6)), rf"codes: expected \[B,n\] int32 or int64, got \[5,6\] float32 {DEVICE}"),
        (dict(codes=torch.full((5, 6), 1000)), r"codes: expected 0..999, got int 1000"),
        (dict(previous=torch.zeros(4, 10)), r"previous: expected \[5,10\] float32 or .*, got \[4,10\]"),
        (dict(null=torch.zeros(3)), r"null: expected \[4\] float32 or .*, got \[3\]"),
        (dict(levels=(8, 5, 5, 1)), r"levels: expected integers of at least 2"),
        (dict(weights=None), r"weights: expected TranslatorWeights, got NoneType None"),
    ],
    ids=str,
)
def test_bad_input_gets_one_sentence(change: dict[str, Any], sentence: str) -> None:
    if "1000" in sentence and DEVICE != "cpu":
        pytest.skip("values are read on the CPU only")
    case = Case(torch.float32)
    change = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in change.items()}
    good = dict(codes=case.codes, k=3, levels=L, null=case.null, previous=case.previous, weights=case.weights, slots=6)
    for backend in ("triton", "reference"):
        with pytest.raises(InputError, match=f"^{sentence}"):
            op.translate(**(good | change), backend=backend)


def test_more_codes_than_there_are_and_backends_by_name() -> None:
    case = Case(torch.float32)
    with pytest.raises(BudgetError, match="k: expected an integer in 0..3, got 4"):
        case.run(4, case.codes[:, :3])
    with pytest.raises(
        BackendError, match="backend: expected one of auto, reference, triton for translate, got 'native'"
    ):
        case.run(2, backend="native")
    with pytest.raises(BackendError, match="backend: expected one of .*, got 'fastest'"):
        case.run(2, backend="fastest")
    named = "triton" if DEVICE == "cuda" else "reference"
    assert torch.equal(case.run(2, backend="auto"), case.run(2, backend=named))
    large = Case(torch.float32, wide=516, depth=1)
    with pytest.raises(
        BackendError, match="backend: expected a translator at most 2048 bytes wide, .* got 516 in float32"
    ):
        large.run(2)
    exact = Case(torch.float64)
    with pytest.raises(BackendError, match="float32, float16 or bfloat16"):
        exact.run(2)
    assert exact.run(2, backend="auto").dtype == torch.float32
    assert {s.name for s in probe(DEVICE) if s.available} >= {"triton", "reference"}


def test_gradients_come_from_the_reference_or_not_at_all() -> None:
    case = Case(torch.float32)
    case.null.requires_grad_()
    case.weights = case.weights._replace(head=case.weights.head.clone().requires_grad_())
    with pytest.raises(BackendError, match="backend: expected one with gradients for translate, got 'triton'"):
        case.run(3)
    with torch.no_grad():
        assert not case.run(3).requires_grad
    null, head = torch.autograd.grad(case.run(3, backend="auto").sum(), [case.null, case.weights.head])
    assert float(null.abs().min()) > 0
    assert float(head.abs().min()) > 0


def test_packing_names_what_is_missing_or_foreign() -> None:
    state = Case(torch.float32).module.state_dict()
    packed = op.pack_translator(state)
    assert torch.equal(packed.stem, state["stem.weight"].t())
    assert torch.equal(packed.up[1], state["blocks.1.up.weight"].t())
    assert all(t.is_contiguous() for t in packed)
    state["stem.weight"].zero_()
    assert bool(packed.stem.any()), "a copy"
    with pytest.raises(InputError, match=r"blocks.1.up.bias: expected \[...\] float32 \w+, got \[64\] float16"):
        op.pack_translator(state | {"blocks.1.up.bias": state["blocks.1.up.bias"].half()})
    with pytest.raises(InputError, match="state: expected a translator's tensors, got none named head.weight"):
        op.pack_translator({name: t for name, t in state.items() if name != "head.weight"})
    with pytest.raises(InputError, match="state: expected a translator's tensors, got none named blocks.0"):
        op.pack_translator({name: t for name, t in state.items() if not name.startswith("blocks")})


def test_opcheck_and_one_graph_under_torch_compile() -> None:
    case = Case(torch.float32)
    args = (case.codes, 3, list(L), case.null, case.previous, list(case.weights), 6)
    told = torch.library.opcheck(torch.ops.flexlam_fast.translate_codes.default, args)
    assert set(told.values()) == {"SUCCESS"}, told

    torch._dynamo.reset()
    compiled = torch.compile(lambda codes, previous: case.run(3, codes, previous), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(case.codes, case.previous), case.run(3))


@pytest.mark.gpu
def test_a_graph_replays_with_new_codes() -> None:
    case = Case(torch.bfloat16)
    codes, previous = case.codes.clone(), case.previous.clone()
    case.run(4, codes, previous)  # compiles, and makes the constants
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run(4, codes, previous)
    codes.copy_(case.codes.flip(0))
    previous.copy_(case.previous.flip(0))
    graph.replay()
    assert torch.equal(out, case.run(4).flip(0))


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """The translator's variants, compiled for sm_90 in a process that does not interpret; fp16 has bf16's code."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "compile_sm90.py"), "^translate/(?!fp16)"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_compiled_code_keeps_to_registers_and_multiplies_on_tensor_cores(compiled: dict[str, dict[str, Any]]) -> None:
    assert len(compiled) == 6
    for name, facts in compiled.items():
        assert facts["spilled"] == 0, name
        assert not facts["tanh"], name
        assert facts["shared"] <= 227 * 1024, name
        if "fp32" not in name:
            assert facts["tensor_cores"] >= 64, name
