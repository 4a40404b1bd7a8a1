"""Randomness as a function of (seed, purpose, step, row): at a step boundary there is no hidden generator state."""

import hashlib

import torch


def derive_seed(seed: int, purpose: str, step: int = 0, row: int = 0) -> int:
    """First 8 bytes of sha256("seed/purpose/step/row"), big-endian: the key of one stream."""
    text = f"{seed}/{purpose}/{step}/{row}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def generator(seed: int, purpose: str, step: int = 0, row: int = 0) -> torch.Generator:
    """A CPU generator for one stream; two different keys give independent numbers."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, step, row))
