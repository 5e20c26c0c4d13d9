"""How many launches a decision is on the Triton path: counted on the meta device, where every op runs and no kernel."""

from __future__ import annotations

import importlib
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from test_graphs import META, fused_by_shapes_alone
from torch.utils._python_dispatch import TorchDispatchMode

from flexlam_fast import layers
from flexlam_fast.backend import TRITON
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.loop import DecisionLoop, How, Stages
from flexlam_fast.sequence.fused import Fused
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.translator import PackedTranslator, Translator

#: Counted when this was written; it may only fall.
MAX_LAUNCHES = 308
CFG = FlexLAMConfig.preset("dmlab")
#: Ops of ours that launch more than one kernel.
KERNELS = {"page_attend_add": 2}
#: What is no kernel, or (the fake attention's ``empty_like``) is counted as the one that attention is on a GPU.
FREE = {"empty", "new_empty", "detach", "_reshape_alias", "promote_types", "_unsafe_view", "scalar_tensor"}


class Launches(TorchDispatchMode):
    """Counts what launches a kernel: not views, and not what only makes or describes a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        if not op.is_view and name not in FREE:
            self.seen[name] += KERNELS.get(name, 1)
        return out


@pytest.fixture(scope="module")
def decisions() -> dict[tuple[int, float], Counter[str]]:
    """Launches of a whole decision, by budget and temperature."""
    with pytest.MonkeyPatch.context() as patch, META:
        lam, sequence, translator = LatentActionModel(CFG, "reference"), SequenceModel(CFG), Translator(CFG)
        for part in (lam.encoder, sequence, translator):
            part.to(torch.bfloat16).requires_grad_(False)
        fused_by_shapes_alone(patch)
        patch.setattr(layers, "attention", lambda q, k, v, implementation: torch.empty_like(q))
        for block in lam.encoder.blocks:
            block.attention.implementation = "sdpa"
        for op in ("modulate", "activation"):  # the encoder's norms and activations, as Policy sets them on a GPU
            patch.setattr(importlib.import_module(f"flexlam_fast.ops.{op}"), "pick_for", lambda *_, **__: TRITON)
        for module in lam.encoder.modules():
            if hasattr(module, "backend"):
                module.backend = TRITON
        packed = PackedTranslator(translator, CFG.bottleneck.levels, CFG.bottleneck.slots, TRITON)
        stages = Stages(lam, Fused(sequence), translator, packed)
        found = {}
        for k, temperature in ((1, 0.0), (2, 0.0), (3, 0.0), (2, 1.0), (3, 1.0)):
            loop = DecisionLoop(CFG, 1, META, torch.bfloat16, torch.bfloat16, 0)
            frames = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
            decide = partial(loop.decide, stages, How(k, temperature), frames, torch.zeros(1, dtype=torch.int64))
            for _ in range(2):  # the first makes what is made once
                with Launches() as counted:
                    decide()
            found[k, temperature] = counted.seen
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_code_is_six_launches_a_layer_the_head_and_the_choice(
    decisions: dict[tuple[int, float], Counter[str]], temperature: float
) -> None:
    more = decisions[3, temperature] - decisions[2, temperature]
    assert sum(more.values()) == 6 * CFG.sequence.layers + 2, more


def test_what_comes_before_the_first_code(decisions: dict[tuple[int, float], Counter[str]]) -> None:
    """Encoder, placing, append and translator: this many nodes of a decision's graph, and no more."""
    assert sum(decisions[1, 0.0].values()) <= MAX_LAUNCHES, decisions[1, 0.0].most_common()
