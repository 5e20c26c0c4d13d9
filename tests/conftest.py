"""What every test shares: a seed, one hypothesis profile, and the skip of GPU tests where there is no GPU."""

from __future__ import annotations

import importlib.util
import os

import hypothesis
import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which must be asked for before triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        from interpreter import settle

        settle()

# Derandomised: a change that passes here passes on the next machine too.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")

# The tests' models are small: a second thread gains little, and on a busy machine the two wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
