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
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from flexlam_fast.backend import AUTO, REFERENCE, TRITON, BackendChoice
from flexlam_fast.config import FlexLAMConfig, SequenceConfig
from flexlam_fast.errors import FlexLAMError
from flexlam_fast.greedy import AllEnded, Greedy, read
from flexlam_fast.sequence import plain
from flexlam_fast.sequence.convert import BLOCK_NAMES, config_from_qwen3
from flexlam_fast.sequence.decode import Runner
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.swapped import Change, Plan, Swapped

# A Qwen3 can only exist where this module is loaded already, so it is looked up and never imported.
_HOME = "transformers.models.qwen3.modeling_qwen3"
_PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
#: Ways of attention that compute the same; others can be registered under any name.
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_QUIET = "transformers.utils.output_capturing"  # its hooks do nothing unless hidden states are asked for
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PACKED = "packed products in plain PyTorch over pages of 64 tokens"
_NATIVE = "a prompt by packed products and every later token by C++, over pages of 64 tokens"
_FUSED = "fused kernels over pages of 64 tokens"


def kind() -> type[nn.Module] | None:
    """The class ``Qwen3ForCausalLM``, or None where nobody has imported it."""
    return getattr(sys.modules.get(_HOME), "Qwen3ForCausalLM", None)


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
    return choice, Change(qwen, "__class__", kind, _accelerated(Plan(kind, asked, choice.name)))


def obstacle(qwen: Any) -> str | None:
    """Why ``qwen`` does not compute what :class:`SequenceModel` does, or None. Every call asks again."""
    try:
        cfg = config_from_qwen3(qwen.config)
    except FlexLAMError as error:
        return str(error)
    weight = qwen.lm_head.weight
    if torch.is_autocast_enabled(weight.device.type):
        return "autocast chooses its dtypes now"
    if qwen.config._attn_implementation not in _ATTENTION:
        return f"its attention is {qwen.config._attn_implementation!r}, which may compute something else"
    if len(qwen.model.layers) != cfg.sequence.layers:
        return f"it has {len(qwen.model.layers)} layers, and its configuration says {cfg.sequence.layers}"
    if hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks:
        return "hooks of all modules would not fire"
    known = _known()
    for path, part in qwen.named_modules():
        unlike = _changed(part, known) or _odd(part, cfg.sequence, weight)
        if unlike is not None:
            return f"{path}: {unlike}" if path else unlike
    return None


def _known() -> set[type]:
    """The classes that a Qwen3 is made of, which a quantised one or one with adapters is not."""
    home = sys.modules[_HOME]
    parts = {getattr(home, f"Qwen3{name}") for name in _PARTS}
    silu = getattr(sys.modules.get("transformers.activations"), "SiLUActivation", nn.SiLU)
    return {*parts, nn.Linear, nn.Embedding, nn.ModuleList, nn.SiLU, silu}


def _changed(part: nn.Module, known: set[type]) -> str | None:
    """What somebody has done to one module of a Qwen3, or None."""
    original = part.plan.original if isinstance(part, Swapped) else type(part)
    if original not in known:
        return f"{original.__name__} is no part of a plain Qwen3 and may compute something else"
    replaced = [
        name for name, value in vars(part).items() if callable(value) and callable(getattr(original, name, None))
    ]
    if replaced:
        return f"its {', '.join(sorted(replaced))} was replaced on the object"
    hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
    if any(getattr(hook, "__module__", None) != _QUIET for hook in hooks):
        return "its hooks would not fire"
    return None


def _odd(part: Any, seq: SequenceConfig, like: Tensor) -> str | None:
    """What one module of a Qwen3 has that its configuration does not say, or None."""
    for p in part._parameters.values():
        if p is not None and not (type(p) is nn.Parameter and p.layout == torch.strided and p.dtype in _DTYPES):
            return "its weights are not plain floating numbers"
        if p is not None and (p.dtype, p.device) != (like.dtype, like.device):
            return f"its weights are {p.dtype} on {p.device}, those of the head {like.dtype} on {like.device}"
    if part._parameters.get("bias") is not None or getattr(part, "max_norm", None) is not None:
        return "it has a bias or a max_norm"
    scale = seq.head_dim**-0.5
    for name, usual in (("variance_epsilon", seq.rms_eps), ("scaling", scale), ("attention_scaling", 1.0)):
        if getattr(part, name, usual) != usual:
            return f"its {name} is {getattr(part, name)}, not {usual}"
    if part.training and getattr(part, "attention_dropout", 0):
        return f"its attention_dropout is {part.attention_dropout}, and it is in training mode"
    if getattr(part, "sliding_window", None) is not None:
        return "it has a sliding window"
    if hasattr(part, "inv_freq"):
        exponent = torch.arange(0, seq.head_dim, 2, dtype=torch.float64, device=part.inv_freq.device) / seq.head_dim
        angles = part.inv_freq.double()
        if angles.shape != exponent.shape or not torch.allclose(angles, seq.rope_theta**-exponent, rtol=1e-6, atol=0):
            return (
                f"its inv_freq are not those of theta {seq.rope_theta:g}: .to() rounds them like weights, so give the "
                "dtype to from_pretrained() in its place"
            )
    return None


class _Mirror:
    """A sequence model whose parameters are those of a Qwen3, and the way through it that was used last."""

    def __init__(self, cfg: FlexLAMConfig) -> None:
        with torch.device("meta"):  # nothing is drawn and nothing allocated
            self.model = SequenceModel(cfg).eval()
        self.names = {"codes": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
        for i in range(cfg.sequence.layers):
            self.names |= {f"blocks.{i}.{a}": f"model.layers.{i}.{b}" for a, b in BLOCK_NAMES.items()}
        self.runner: Runner | None = None
        self.key: object = None

    def share(self, qwen: nn.Module) -> str | None:
        """Take over the ``Parameter`` objects of ``qwen``; the one that does not fit is named."""
        for ours, theirs in self.names.items():
            part, weight = self.model.get_submodule(ours), qwen.get_parameter(f"{theirs}.weight")
            old = self.model.get_parameter(f"{ours}.weight")
            if old.shape != weight.shape:
                return f"{theirs}: expected weights {list(old.shape)}, got {list(weight.shape)}"
            if old is not weight:
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

    def generate(self: Any, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Tokens int64 ``[B, N + new]`` as the original's; whatever is not plain greedy is the original's to answer."""
        how = None if args else read(self, self.plan.original, inputs, generation_config, kwargs)
        if isinstance(how, Greedy) and obstacle(self) is None:
            mirror = mirror_of(self)
            if isinstance(mirror, _Mirror):
                stop = AllEnded(how) if how.ends else None
                return how.finish(plain.generate(mirror.way(self.plan.asked), how.prompt, how.most, stop))
        return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]


@cache
def _accelerated(plan: Plan) -> type[nn.Module]:
    """The subclass of the original Qwen3 for ``plan``, of the same name, which transformers writes into files."""
    name = plan.original.__name__
    return type(name, (_AcceleratedQwen3, plan.original), {"plan": plan, "__module__": __name__})
