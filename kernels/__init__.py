"""Triton kernels, installed as ``flexlam_fast.kernels``; this version has none."""
