"""Operations with one visible fork each: check the arguments, pick the backend, call it."""

from flexlam_fast.ops.activation import gelu, swiglu
from flexlam_fast.ops.attention import attention
from flexlam_fast.ops.draws import draw_normal, draw_uniform
from flexlam_fast.ops.flow_loss import flow_loss
from flexlam_fast.ops.fsq import codes_to_latents, fsq, fsq_project, fsq_sample
from flexlam_fast.ops.linear import linear_add, norm_linear, norm_swiglu
from flexlam_fast.ops.linear_train import linear_bf16
from flexlam_fast.ops.loss import cross_entropy
from flexlam_fast.ops.modulate import adaln, gate_add, layer_norm
from flexlam_fast.ops.paged import attend_add, paged_attention, write_pages
from flexlam_fast.ops.patches import flow_patches, frame_patches, tubelets
from flexlam_fast.ops.rms_norm import rms_norm
from flexlam_fast.ops.rotary import qk_norm_rope
from flexlam_fast.ops.sampling import choose_codes, next_token
from flexlam_fast.ops.self_attention import self_attention, self_attention_packed
from flexlam_fast.ops.translate import pack_translator, translate
from flexlam_fast.ops.varlen import varlen_attention

__all__ = [
    "adaln",
    "attend_add",
    "attention",
    "choose_codes",
    "codes_to_latents",
    "draw_normal",
    "draw_uniform",
    "flow_loss",
    "flow_patches",
    "frame_patches",
    "cross_entropy",
    "fsq",
    "fsq_project",
    "fsq_sample",
    "gate_add",
    "gelu",
    "layer_norm",
    "linear_add",
    "linear_bf16",
    "next_token",
    "norm_linear",
    "norm_swiglu",
    "pack_translator",
    "paged_attention",
    "rms_norm",
    "swiglu",
    "self_attention",
    "self_attention_packed",
    "translate",
    "tubelets",
    "qk_norm_rope",
    "varlen_attention",
    "write_pages",
]
