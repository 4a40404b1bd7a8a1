"""Triton asks for its interpreter when it is imported, and any test module may be the first to do so."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
