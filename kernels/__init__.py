"""Triton kernels, installed as ``flexlam_fast.kernels``. Nothing here is imported before a kernel is launched."""
