"""What ``ff.accelerate`` leaves as it is, and the reason it gives."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate_cases import L, Mine, assert_same
from torch import nn
from torch.nn.utils import parametrize

from flexlam_fast.accelerate import accelerate
from flexlam_fast.errors import InputError

vector_quantize = pytest.importorskip("vector_quantize_pytorch")
FSQ = vector_quantize.FSQ
ResidualFSQ = vector_quantize.ResidualFSQ
home = vector_quantize.finite_scalar_quantization


def replaced() -> FSQ:
    fsq = FSQ(L)
    fsq.forward = lambda z: (z, None)
    return fsq


def parametrized() -> FSQ:
    fsq = FSQ(L, dim=6)
    fsq.weight = nn.Parameter(torch.zeros(3))
    parametrize.register_parametrization(fsq, "weight", nn.Identity())
    return fsq


def altered(**attributes: Any) -> FSQ:
    fsq = FSQ(L)
    for name, value in attributes.items():
        setattr(fsq, name, value)
    return fsq


LEFT: list[tuple[str, Callable[[], FSQ], str]] = [
    ("preserve_symmetry", lambda: FSQ(L, preserve_symmetry=True), "preserve_symmetry is True, which rounds to other"),
    ("noise_dropout", lambda: altered(noise_dropout=0.5), "noise_dropout is 0.5, which adds random offsets"),
    ("bound_hard_clamp", lambda: FSQ(L, bound_hard_clamp=True), "bound_hard_clamp is True, which bounds by a clamp"),
    ("orthogonal_rotation", lambda: FSQ([5, 5], orthogonal_rotation=True), "orthogonal_rotation is True, which rot"),
    ("level", lambda: FSQ([8, 1]), "levels are [8, 1], and a level below 2 holds no code"),
    ("codes", lambda: FSQ([1024, 1025]), "it has 1049600 codes, more than 1048576, up to which they can be counted"),
    ("int32", lambda: FSQ([17] * 9, return_indices=False), f"it has {17**9} codes, more than 2147483647, up to which"),
    ("keep", lambda: altered(num_codebooks=2), "keep_num_codebooks_dim is False with 2 codebooks"),
    ("subclass", lambda: Mine(L), "Mine is a subclass of FSQ and may compute something else"),
    ("parametrized", parametrized, "ParametrizedFSQ is a subclass of FSQ and may compute something else"),
    ("forward", replaced, "its forward was replaced on the object"),
    ("meta", lambda: FSQ(L).to("meta"), "it is on the meta device; accelerate it once its numbers are loaded"),
]


@pytest.mark.parametrize(("make", "sentence"), [row[1:] for row in LEFT], ids=[row[0] for row in LEFT])
def test_what_computes_something_else_is_left_with_the_reason(make: Callable[[], FSQ], sentence: str) -> None:
    try:
        fsq = make()
    except TypeError:
        pytest.skip("this release has no such option")
    was, held = type(fsq), dict(vars(fsq))
    record = accelerate(nn.Sequential(fsq))
    assert record.swapped == ()
    assert [(part.path, part.kind, part.backend) for part in record.left] == [("0", "FSQ", None)]
    assert record.left[0].reason.startswith(sentence)
    assert "\n" not in record.left[0].reason
    assert f"left     0  FSQ: {sentence}" in str(record)
    assert type(fsq) is was
    assert vars(fsq) == held


def test_the_layers_of_a_residual_fsq_are_left_as_they_are() -> None:
    model = ResidualFSQ(levels=L, num_quantizers=2, dim=4)
    theirs = copy.deepcopy(model)
    record = accelerate(model)
    assert len(record.swapped) + len(record.left) == 2
    z = torch.randn(2, 7, 4)
    assert_same(model.eval()(z), theirs.eval()(z))


def test_under_another_default_dtype_it_is_left() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        record = accelerate(FSQ(L))
    finally:
        torch.set_default_dtype(torch.float32)
    assert record.swapped == ()
    reason = "it forms its constants in torch's default dtype, which is torch.bfloat16 now"
    assert [part.reason for part in record.left] == [reason]


def release(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, old: str, new: str) -> Any:
    """The class FSQ of another release: of a module of the same name whose file has ``new`` in the place of ``old``."""
    text = Path(home.__file__).read_text()
    assert old in text
    file = tmp_path / f"release{len(list(tmp_path.iterdir()))}.py"
    file.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(home.__name__, file)
    assert spec is not None
    assert spec.loader is not None
    other = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, home.__name__, other)
    spec.loader.exec_module(other)
    return other.FSQ


def test_an_unknown_release_is_tried_before_it_is_swapped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = release(monkeypatch, tmp_path, "maybe_tanh(z + shift)", "maybe_tanh(1.1 * z + shift)")
    assert "gives other values than the formula" in accelerate(other(L)).left[0].reason
    other = release(monkeypatch, tmp_path, ".round().to(int32)", ".round().sub(1).clamp(min = 0).to(int32)")
    assert "gives other codes than the formula" in accelerate(other(L)).left[0].reason
    assert accelerate(other(L, return_indices=False)).left == (), "no codes, no wrong codes"
    other = release(monkeypatch, tmp_path, "1e-3", "1e-3 * 1")
    assert len(accelerate(other(L)).swapped) == 1


def test_an_option_of_a_newer_release_is_left_unless_it_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    class Newer(FSQ):
        def __init__(self, levels: list[int], wobble: float = 0.0) -> None:
            super().__init__(levels)
            self.wobble = wobble

    monkeypatch.setattr(home, "FSQ", Newer)
    assert len(accelerate(Newer(L)).swapped) == 1
    assert accelerate(Newer(L, 0.5)).left[0].reason.startswith("wobble is an option of a newer")
    lacking = Newer(L)
    del lacking.codebook_dim
    assert accelerate(lacking).left[0].reason.endswith("has an FSQ without codebook_dim")


def test_nothing_recognised_is_no_error() -> None:
    record = accelerate(nn.Sequential(nn.Linear(3, 3)))
    assert (record.swapped, record.left) == ((), ())
    sentence = "accelerate: found no FSQ, Qwen3ForCausalLM or Bottleneck in the Sequential itself"
    assert str(record) == sentence
    record.undo()


@pytest.mark.parametrize("module", [3, None, FSQ, "fsq", torch.zeros(2, 3)])
def test_what_is_no_module_gets_one_sentence(module: Any) -> None:
    with pytest.raises(InputError, match=r"^module: expected an nn\.Module, got \S.*$"):
        accelerate(module)
