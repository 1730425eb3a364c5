"""Shared fixtures: reference values, the real teacher, and a tiny data set of our own."""

from pathlib import Path

import numpy as np
import pytest
import torch

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


@pytest.fixture
def golden():
    """Read reference values of the published programs: arrays by name, lists of scales by ``scales(name)``."""
    return Golden


class Golden:
    """One file of reference values."""

    def __init__(self, name: str) -> None:
        path = SHARED / "golden" / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"reference values are not here: {path.name} (they lie in ../shared/golden)")
        self.arrays = np.load(path)

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name])

    def scales(self, name: str, *, requires_grad: bool = False) -> list[torch.Tensor]:
        return [self[f"{name}{i}"].requires_grad_(requires_grad) for i in range(3)]
