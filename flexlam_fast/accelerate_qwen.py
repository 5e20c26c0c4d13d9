"""What :mod:`flexlam_fast.accelerate` does for ``transformers`` Qwen3: greedy ``generate`` over our pages and kernels.

A ``Qwen3ForCausalLM`` keeps its identity, parameters, hooks and state dict: what changes is its class, to a subclass
with another ``generate``. Beside it stands a :class:`SequenceModel` of the same ``Parameter`` objects, so that weights
are held once and a change of them counts.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from flexlam_fast.backend import AUTO, REFERENCE, TRITON, BackendChoice
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.greedy import AllEnded, Greedy, read
from flexlam_fast.qwen_obstacles import HOME, obstacle
from flexlam_fast.sequence import plain
from flexlam_fast.sequence.convert import BLOCK_NAMES, config_from_qwen3
from flexlam_fast.sequence.decode import Runner
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.swapped import Change, Plan, Swapped, note

_PACKED = "packed products in plain PyTorch over pages of 64 tokens"
_NATIVE = "a prompt by packed products and every later token by C++, over pages of 64 tokens"
_FUSED = "fused kernels over pages of 64 tokens"


def kind() -> type[nn.Module] | None:
    """The class ``Qwen3ForCausalLM``, or None where nobody has imported it."""
    return getattr(sys.modules.get(HOME), "Qwen3ForCausalLM", None)


def swap(
    qwen: nn.Module, kind: type[nn.Module], asked: str, choice: BackendChoice
) -> tuple[BackendChoice, Change | str]:
    """The backend for ``qwen`` and what to change, or in one sentence why nothing is changed.

    Raises:
        BackendError: one asked for by name does not take its sizes.
    """
    unlike = obstacle(qwen)
    if unlike is not None:
        return choice, unlike
    mirror = mirror_of(qwen)
    if isinstance(mirror, str):
        return choice, mirror
    if asked != REFERENCE:
        weight = mirror.model.head.weight
        fused = plain.takes_kernels(mirror.model.cfg.sequence, asked, weight.device, weight.dtype)
        name = TRITON if fused else REFERENCE if choice.name == TRITON else choice.name
        start = f"the fastest on {weight.device}" if asked == AUTO else "asked for by name"
        plainly = _NATIVE if plain.takes_native(weight.device, weight.dtype) else _PACKED
        choice = BackendChoice(name, f"{start}: {_FUSED if fused else plainly}")
    plain.pack_weights(mirror.way(asked))  # now, and not in a call, during which another thread may read them
    return choice, Change(qwen, "__class__", kind, _accelerated(Plan(kind, asked, choice.name)))


class _Mirror:
    """A sequence model whose parameters are those of a Qwen3, and the way through it that was used last."""

    def __init__(self, cfg: FlexLAMConfig) -> None:
        with torch.device("meta"):  # nothing is drawn and nothing allocated
            self.model = SequenceModel(cfg).eval()
        names = {"codes": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
        for i in range(cfg.sequence.layers):
            names |= {f"blocks.{i}.{a}": f"model.layers.{i}.{b}" for a, b in BLOCK_NAMES.items()}
        parts = [(self.model.get_submodule(ours), theirs.split(".")) for ours, theirs in names.items()]
        #: Modules here, the names that lead to their counterparts in a Qwen3, and the shapes of their weights.
        self.parts = [(part, theirs, part.get_parameter("weight").shape) for part, theirs in parts]
        self.runner: Runner | None = None
        self.key: object = None

    def share(self, qwen: nn.Module) -> str | None:
        """Take over the ``Parameter`` objects of ``qwen``; the one that does not fit is named."""
        for part, names, shape in self.parts:
            theirs = qwen
            for name in names:
                theirs = theirs._modules[name]  # type: ignore[assignment]
            weight = theirs._parameters["weight"]
            assert weight is not None  # which is an obstacle
            if shape != weight.shape:
                return f"{'.'.join(names)}: expected weights {list(shape)}, got {list(weight.shape)}"
            if part._parameters["weight"] is not weight:
                part.weight = weight
        return None

    def way(self, asked: str) -> Runner:
        """The way that belongs to a backend where the weights are now; it keeps what it has packed."""
        weight = self.model.head.weight
        key = asked, weight.device, weight.dtype
        if self.runner is None or key != self.key:
            self.runner, self.key = plain.runner_of(self.model, asked), key
        return self.runner


#: What has been made for each Qwen3, made anew where it is missing; not on the object, which holds nothing new.
_mirrors: WeakKeyDictionary[nn.Module, _Mirror] = WeakKeyDictionary()


def mirror_of(qwen: Any) -> _Mirror | str:
    """The mirror of ``qwen`` with its present parameters, or in one sentence which of them does not fit."""
    cfg = config_from_qwen3(qwen.config)
    mirror = _mirrors.get(qwen)
    if mirror is None or mirror.model.cfg != cfg:
        mirror = _mirrors[qwen] = _Mirror(cfg)
    return mirror.share(qwen) or mirror


class _AcceleratedQwen3(Swapped):
    """What takes the place of a Qwen3's ``generate``."""

    @staticmethod
    def obstacle(module: Any) -> str | None:
        """As :func:`obstacle`, and whether the shapes of its weights fit."""
        why = obstacle(module)
        mirror = None if why is not None else mirror_of(module)
        return mirror if isinstance(mirror, str) else why

    def generate(self: Any, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Tokens int64 ``[B, N + new]`` as the original's; whatever is not plain greedy is the original's to answer."""
        plan = getattr(type(self), "plan", None)
        if plan is None:  # somebody has held this method since before an undo
            return type(self).generate(self, inputs, generation_config, *args, **kwargs)
        asked = "it is called with further arguments" if args else _read(self, plan, inputs, generation_config, kwargs)
        if isinstance(asked, str):
            note(self, asked)
            return plan.original.generate(self, inputs, generation_config, *args, **kwargs)
        how, mirror = asked
        stop = AllEnded(how) if how.ends else None
        return how.finish(plain.generate(mirror.way(plan.asked), how.prompt, how.most, stop))


def _read(qwen: Any, plan: Plan, inputs: Any, config: Any, options: dict[str, Any]) -> tuple[Greedy, _Mirror] | str:
    """What a call of ``generate`` asks for and what answers it, or in one sentence why the original has to."""
    unlike = obstacle(qwen)
    how = unlike or read(qwen, plan.original, inputs, config, options)
    if isinstance(how, str):
        return how
    mirror = mirror_of(qwen)
    return mirror if isinstance(mirror, str) else (how, mirror)


@cache
def _accelerated(plan: Plan) -> type[nn.Module]:
    """The subclass of the original Qwen3 for ``plan``, of the same name, which transformers writes into files."""
    name = plan.original.__name__
    return type(name, (_AcceleratedQwen3, plan.original), {"plan": plan, "__module__": __name__})
