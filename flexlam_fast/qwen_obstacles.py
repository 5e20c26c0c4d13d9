"""Why a ``transformers`` Qwen3 computes something else than :class:`SequenceModel` with its weights.

Whatever another library, or the user, has done to it or to the classes and functions that it is made of is looked for
here: modules and methods that were replaced, hooks, attributes that a plain Qwen3 has otherwise, torch's own states.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from flexlam_fast.config import SequenceConfig
from flexlam_fast.errors import FlexLAMError
from flexlam_fast.originals import Watch, reachable
from flexlam_fast.provenance import Place, defines
from flexlam_fast.sequence.convert import config_from_qwen3
from flexlam_fast.swapped import interceptor, is_compiling

# A Qwen3 can only exist where this module is loaded already, so it is looked up and never imported.
HOME = "transformers.models.qwen3.modeling_qwen3"
_PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
#: Ways of attention that compute the same; others can be registered under any name.
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_QUIET = "transformers.utils.output_capturing"  # its hooks do nothing unless hidden states are asked for
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Methods of every module that stand between a call and ``forward``.
_CALLS = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__", "forward")
#: Modules of transformers whose functions are followed to what they call.
_FOLLOWED = (
    HOME, *(f"transformers.{name}" for name in (
        "masking_utils", "cache_utils", "generation.utils", "modeling_rope_utils", "modeling_layers", "activations",
        "integrations.sdpa_attention", "integrations.flash_attention", "integrations.flex_attention",
    )),
)  # fmt: skip
_READS = ("__getitem__", "get_interface")  # of tables of attention functions
#: Classes that take part in a call, and are asked by all of their methods.
_HELPERS = {
    "cache_utils": ("Cache", "DynamicCache", "DynamicLayer"),
    "generation.logits_process": ("LogitsProcessorList",),
    "generation.stopping_criteria": ("StoppingCriteriaList", "MaxLengthCriteria", "EosTokenCriteria"),
}
_TORCH: dict[Any, tuple[str, ...]] = {
    torch.nn.functional: ("linear", "embedding", "silu", "softmax", "dropout", "scaled_dot_product_attention"),
    torch: ("matmul", "cat", "rsqrt", "arange", "argmax"),
    nn.ModuleList: ("__iter__", "__getitem__", "__len__"),
}


def obstacle(qwen: Any) -> str | None:
    """Why ``qwen`` does not compute what :class:`SequenceModel` does, or None. Every call asks again."""
    if is_compiling():
        return "torch.compile traces the call"
    try:
        return interceptor() or _obstacle(qwen)
    except FlexLAMError as error:
        return str(error)
    except AttributeError as error:
        return f"it is not built like a Qwen3: {error}"


def _obstacle(qwen: Any) -> str | None:
    cfg, parts = config_from_qwen3(qwen.config).sequence, list(qwen.named_modules())
    known = {kind: _shadowing(kind, cfg) for kind in _known()}
    for path, part in parts:
        unlike = _changed(part, known)
        if unlike is not None:
            return f"{path}: {unlike}" if path else unlike
    weight = qwen.lm_head.weight
    unlike = _odd_model(qwen, cfg, weight)
    if unlike is not None:
        return unlike
    for path, part in parts:
        unlike = _odd(part, cfg, weight) or _other_config(part, qwen.config)
        if unlike is not None:
            return f"{path}: {unlike}" if path else unlike
    return _watch(qwen.config._attn_implementation).replaced()


def _odd_model(qwen: Any, cfg: SequenceConfig, weight: Tensor) -> str | None:
    """What is unlike a plain Qwen3 of the model as a whole; ``weight`` is its head's."""
    if weight.is_meta:
        return "it is on the meta device"
    if torch.is_autocast_enabled(weight.device.type):
        return "autocast chooses its dtypes now"
    if hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks:
        return "hooks of all modules would not fire"
    if qwen.config._attn_implementation not in _ATTENTION:
        return f"its attention is {qwen.config._attn_implementation!r}, which may compute something else"
    if len(qwen.model.layers) != cfg.layers:
        return f"it has {len(qwen.model.layers)} layers, and its configuration says {cfg.layers}"
    if set(getattr(qwen.config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return f"its configuration has layers of other types than 'full_attention': {qwen.config.layer_types}"
    for i, layer in enumerate(qwen.model.layers):
        if layer.self_attn.layer_idx != i:
            return f"model.layers.{i}.self_attn: its layer_idx is {layer.self_attn.layer_idx}, not {i}"
    return None


def _known() -> set[type]:
    """The classes that a Qwen3 is made of, which a quantised one or one with adapters is not."""
    home = sys.modules.get(HOME)
    parts = {getattr(home, f"Qwen3{name}") for name in _PARTS}
    return {*parts, nn.Linear, nn.Embedding, nn.ModuleList, nn.SiLU, _silu()}


def _silu() -> type[nn.Module]:
    return getattr(sys.modules.get("transformers.activations"), "SiLUActivation", nn.SiLU)


def _shadowing(kind: type, seq: SequenceConfig) -> list[str]:
    """Attributes that a plain Qwen3 has on its objects, and somebody has put on one of its classes."""
    return [name for name in (*_usual(seq), "layer_idx", "attention_dropout", "sliding_window") if hasattr(kind, name)]


def original_of(part: nn.Module) -> type[nn.Module]:
    """The class of ``part``, or what it was before it was swapped; not if it has been given a third class since."""
    plan = vars(type(part)).get("plan")
    return type(part) if plan is None else plan.original


def _changed(part: nn.Module, known: dict[type, list[str]]) -> str | None:
    """What somebody has done to one module of a Qwen3, or None."""
    original, state = original_of(part), vars(part)
    if original not in known:
        return f"{original.__name__} is no part of a plain Qwen3 and may compute something else"
    replaced = [name for name, value in state.items() if callable(value) and _is_replaced(part, original, name, value)]
    held = *part._modules, *part._parameters, *part._buffers
    replaced += [name for name in held if name in state]
    if replaced:
        return f"its {', '.join(sorted(replaced))} was replaced on the object"
    replaced = known[original] + [name for name in held if hasattr(original, name)]
    if replaced:
        return f"its {', '.join(sorted(replaced))} was replaced on the class"
    if state.get("_compiled_call_impl") is not None:
        return "it was compiled by compile(), and what was compiled would not run"
    if part._forward_hooks or part._forward_pre_hooks:
        hooks = *part._forward_hooks.values(), *part._forward_pre_hooks.values()
        if any(getattr(hook, "__module__", None) != _QUIET for hook in hooks):
            return "its hooks would not fire"
    return None


def _is_replaced(part: nn.Module, original: type[nn.Module], name: str, value: Any) -> bool:
    """Whether an attribute of the object stands before a method of its class, and is not that very method."""
    method = getattr(original, name, None)
    own = getattr(value, "__self__", None) is part and getattr(value, "__func__", None) is method
    return callable(method) and not own


def _odd(part: nn.Module, seq: SequenceConfig, like: Tensor) -> str | None:
    """What one module of a Qwen3 has that its configuration does not say, or None."""
    state = vars(part)
    for p in part._parameters.values():
        unlike = None if p is None else _other_weight(p, like)
        if unlike is not None:
            return unlike
    weighs = isinstance(part, nn.Linear | nn.Embedding) or "variance_epsilon" in state
    if weighs and part._parameters.get("weight") is None:
        return "its weight is no parameter"
    if part._parameters.get("bias") is not None or state.get("max_norm") is not None:
        return "it has a bias or a max_norm"
    for name, usual in _usual(seq).items():
        if state.get(name, usual) != usual:
            return f"its {name} is {state[name]}, not {usual}"
    if part.training and state.get("attention_dropout"):
        return f"its attention_dropout is {state['attention_dropout']}, and it is in training mode"
    if state.get("sliding_window") is not None:
        return "it has a sliding window"
    inv_freq = state.get("inv_freq", part._buffers.get("inv_freq"))
    return None if inv_freq is None else _other_frequencies(inv_freq, seq)


def _other_weight(p: nn.Parameter, like: Tensor) -> str | None:
    """In what a parameter is unlike the head's."""
    if type(p) is not nn.Parameter or p.layout != torch.strided or p.dtype not in _DTYPES:
        return "its weights are not plain floating numbers"
    if (p.dtype, p.device) != (like.dtype, like.device):
        return f"its weights are {p.dtype} on {p.device}, those of the head {like.dtype} on {like.device}"
    if p.is_inference() != like.is_inference():
        return "its weights or those of the head were made in inference mode, and the others were not"
    return None


@cache
def _usual(seq: SequenceConfig) -> dict[str, Any]:
    """Attributes that modules of a Qwen3 may have, and their values in a plain one of such sizes."""
    return {
        "variance_epsilon": seq.rms_eps,
        "scaling": seq.head_dim**-0.5,
        "head_dim": seq.head_dim,
        "num_key_value_groups": seq.heads // seq.kv_heads,
        "is_causal": True,
        "attention_scaling": 1.0,
        "rope_type": "default",
        "attention_type": "full_attention",
        "has_sliding_layers": False,
    }


def _other_frequencies(inv_freq: Tensor, seq: SequenceConfig) -> str | None:
    """Whether the frequencies of RoPE are others than those of its configuration."""
    exponent = torch.arange(0, seq.head_dim, 2, dtype=torch.float64, device=inv_freq.device) / seq.head_dim
    angles = inv_freq.double()
    if angles.shape != exponent.shape or not torch.allclose(angles, seq.rope_theta**-exponent, rtol=1e-6, atol=0):
        return (
            f"its inv_freq are not those of theta {seq.rope_theta:g}: .to() rounds them like weights, so give the "
            "dtype to from_pretrained() in its place"
        )
    return None


def _other_config(part: nn.Module, config: Any) -> str | None:
    """Whether a module reads another configuration than the model's that would choose another attention."""
    mine = vars(part).get("config", config)
    if mine is not config and mine._attn_implementation != config._attn_implementation:
        return f"its configuration has attention {mine._attn_implementation!r}, not {config._attn_implementation!r}"
    return None


@cache
def _watch(attention: str) -> Watch:
    """Watches the functions of transformers and of torch that a Qwen3 with such attention goes through."""
    return Watch(lambda: reachable(_roots(attention), _FOLLOWED), ("transformers", "torch"))


def _roots(attention: str) -> Iterator[Place]:
    home = sys.modules.get(HOME)
    yield from (Place(home, f"Qwen3{name}") for name in _PARTS)
    for kind in _known() - {nn.ModuleList}:
        yield from (Place(kind, name) for name in _CALLS)
    helpers = [getattr(home, f"Qwen3{_PARTS[0]}")]
    for module, names in _HELPERS.items():
        found = (getattr(sys.modules.get(f"transformers.{module}"), name, None) for name in names)
        helpers += [kind for kind in found if kind is not None]
    for kind in helpers:
        for base in kind.__mro__:
            if base.__module__ in (*_FOLLOWED, kind.__module__):
                yield from (Place(kind, name) for name, value in vars(base).items() if _is_method(base, name, value))
    for holder, names in _TORCH.items():
        yield from (Place(holder, name) for name in names)
    masks = sys.modules.get("transformers.masking_utils")
    for where, name in ((home, "ALL_ATTENTION_FUNCTIONS"), (masks, "ALL_MASK_ATTENTION_FUNCTIONS")):
        table = getattr(where, name, None)
        if table is not None:
            yield from (Place(type(table), reads) for reads in _READS if hasattr(type(table), reads))
            yield Place(table, attention)


def _is_method(base: type, name: str, value: Any) -> bool:
    """Whether an attribute of a class is a method of the library's that may run in a call.

    None is what builds, prints or compares an object, nor what somebody has added under a name that nobody calls.
    """
    runs = not name.startswith("__") or name in _CALLS or name in ("__getitem__", "__iter__", "__len__")
    return isinstance(value, FunctionType) and runs and defines(base.__module__, name)
