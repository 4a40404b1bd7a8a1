"""Triton kernels: faster bodies of functions whose readable form stands in `minirlhf/ops.py`. torch and triton only."""
