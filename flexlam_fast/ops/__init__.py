"""Operations with one visible fork each: check the arguments, pick the backend, call it."""

from flexlam_fast.ops.fsq import codes_to_latents, fsq, fsq_project, fsq_sample

__all__ = ["codes_to_latents", "fsq", "fsq_project", "fsq_sample"]
