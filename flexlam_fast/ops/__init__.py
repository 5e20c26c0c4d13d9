"""Operations with one visible fork each: check the arguments, pick the backend, call it."""

from flexlam_fast.ops.attention import attention
from flexlam_fast.ops.fsq import codes_to_latents, fsq, fsq_project, fsq_sample
from flexlam_fast.ops.linear import linear_add, norm_linear, norm_swiglu
from flexlam_fast.ops.loss import cross_entropy
from flexlam_fast.ops.paged import attend_add, paged_attention, write_pages
from flexlam_fast.ops.rotary import qk_norm_rope
from flexlam_fast.ops.sampling import choose_codes, next_token
from flexlam_fast.ops.translate import pack_translator, translate
from flexlam_fast.ops.varlen import varlen_attention

__all__ = [
    "attend_add",
    "attention",
    "choose_codes",
    "codes_to_latents",
    "cross_entropy",
    "fsq",
    "fsq_project",
    "fsq_sample",
    "linear_add",
    "next_token",
    "norm_linear",
    "norm_swiglu",
    "pack_translator",
    "paged_attention",
    "qk_norm_rope",
    "translate",
    "varlen_attention",
    "write_pages",
]
