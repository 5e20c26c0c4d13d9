"""Imports of ``ff.accelerate``: none of the other package, and its own name is a call in any order."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from accelerate_cases import L
from torch import nn

import flexlam_fast as ff
from flexlam_fast.accelerate import accelerate
from flexlam_fast.bottleneck import Bottleneck
from flexlam_fast.config import BottleneckConfig

vector_quantize = pytest.importorskip("vector_quantize_pytorch")
FSQ = vector_quantize.FSQ


def test_the_other_package_is_looked_up_and_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(sys.modules["flexlam_fast.accelerate"].__file__ or "").read_text()
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert len(imports) > 5
    assert not [node for node in imports if "vector_quantize" in ast.unparse(node)]
    assert "import_module" not in source
    fsq = FSQ(L)
    for name in [name for name in sys.modules if name.startswith("vector_quantize_pytorch")]:
        monkeypatch.delitem(sys.modules, name)
    assert accelerate(nn.Sequential(fsq)).swapped == ()
    bottleneck = Bottleneck(BottleneckConfig(levels=tuple(L), slots=7))
    assert len(accelerate(bottleneck).swapped) == 1
    assert not [name for name in sys.modules if name.startswith("vector_quantize_pytorch")]


def test_the_public_name_is_a_call_in_whatever_order_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(vars(ff), "accelerate", raising=False)
    assert ff.accelerate is accelerate
    # the name as Python leaves it when the submodule is imported first
    monkeypatch.setattr(ff, "accelerate", sys.modules["flexlam_fast.accelerate"])
    assert len(ff.accelerate(FSQ(L), backend="reference").swapped) == 1
