"""What every test module may use."""

import os

import pytest
import torch

# Triton asks for its interpreter when it is imported, and any test module may be the first to do so.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # models are tiny; several threads wait for each other wherever something else runs


@pytest.fixture(scope="session")
def stages(tmp_path_factory):
    """A folder in which tiny SFT and reward-model runs have ended; to be read or copied, not changed."""
    from test_scripts import TINY, script

    cwd = tmp_path_factory.mktemp("stages")
    for name in ("sft", "rm"):
        script(name, *TINY[name], cwd=cwd)
    return cwd
