"""Taking over the weights of a ``transformers`` Qwen3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from flexlam_fast.config import BottleneckConfig, FlexLAMConfig, SequenceConfig
from flexlam_fast.errors import InputError

if TYPE_CHECKING:
    from flexlam_fast.sequence.model import SequenceModel

# ours -> theirs, inside one block
BLOCK_NAMES = {
    "norm1": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "norm2": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def config_from_qwen3(hf: Any) -> FlexLAMConfig:
    """Read the sizes off a ``transformers`` Qwen3 configuration; the vocabulary becomes a one-channel codebook."""
    if getattr(hf, "model_type", None) != "qwen3":
        raise InputError(f"hf_model: expected a Qwen3 model, got {getattr(hf, 'model_type', type(hf).__name__)!r}")
    rope = getattr(hf, "rope_parameters", None) or {}
    theta: Any = rope.get("rope_theta") or getattr(hf, "rope_theta", 1e4)
    kind = rope.get("rope_type", "default")
    extras = {"biases": hf.attention_bias, "sliding windows": hf.use_sliding_window, "scaled RoPE": kind != "default"}
    found = [name for name, used in extras.items() if used] or hf.hidden_act
    if found != "silu":
        raise InputError(f"hf_model: expected silu without biases, sliding windows or scaled RoPE, got {found}")
    return FlexLAMConfig(
        bottleneck=BottleneckConfig(levels=(hf.vocab_size,), slots=64),
        sequence=SequenceConfig(
            hidden=hf.hidden_size,
            intermediate=hf.intermediate_size,
            layers=hf.num_hidden_layers,
            heads=hf.num_attention_heads,
            kv_heads=hf.num_key_value_heads,
            head_dim=hf.head_dim,
            rope_theta=float(theta),
            rms_eps=hf.rms_norm_eps,
        ),
    )


def from_qwen3(kind: type[SequenceModel], hf_model: Any) -> SequenceModel:
    """Build a sequence model of ``kind`` with the weights of ``hf_model`` (see ``SequenceModel.from_qwen3``)."""
    hf = getattr(hf_model, "config", None)
    if hf is None or not hasattr(hf_model, "lm_head"):
        raise InputError(f"hf_model: expected a transformers Qwen3ForCausalLM, got {type(hf_model).__name__}")
    theirs = hf_model.state_dict()
    wanted = {"codes": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    for i in range(hf.num_hidden_layers):
        wanted |= {f"blocks.{i}.{a}": f"model.layers.{i}.{b}" for a, b in BLOCK_NAMES.items()}
    model = kind(config_from_qwen3(hf))
    source = theirs["lm_head.weight"]
    model = model.to(device=source.device, dtype=source.dtype)
    with torch.no_grad():
        for ours, name in wanted.items():
            model.get_parameter(f"{ours}.weight").copy_(theirs[f"{name}.weight"])
    return model.eval()
