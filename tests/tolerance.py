"""Named tolerances, the only ones the tests use: maximum absolute and relative difference."""

import torch

exact = {"rtol": 0.0, "atol": 0.0}
fp64 = {"rtol": 1e-9, "atol": 1e-10}  # printed goldens carry 10 digits
fp32 = {"rtol": 1e-5, "atol": 2e-6}
bf16 = {"rtol": 2e-2, "atol": 2e-2}


def assert_close(actual: torch.Tensor, expected: object, tolerance: dict[str, float]) -> None:
    """Values only: shapes must match, dtypes may differ (goldens are Python floats)."""
    expected = torch.as_tensor(expected, dtype=actual.dtype, device=actual.device)
    torch.testing.assert_close(actual, expected, **tolerance)
