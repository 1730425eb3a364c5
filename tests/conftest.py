"""Shared fixtures: reference values and a tiny data set of our own.

torch and anomalib are imported where they are used: pytest-xdist's first process loads this file and needs neither.
"""

from __future__ import annotations

import os

# Tiny networks gain nothing by threads, which wait for each other once two things run (25 times slower).
# Before torch and numba load (numba's would turn on torch's), and for the processes that tests start.
os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}

import gc
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    import torch
    from anomalib.data import Folder

GOLDEN = Path(__file__).with_name("golden")


# The longest files. The Makefile has each process take whole files in order: begun with these, they end together.
LONGEST = ["contract", "published", "users_export", "docs", "aand_stages", "training", "benchmark", "registration"]
LONGEST += ["export", "demo", "users_training", "users_outputs", "rdpp", "experiments", "teacher"]


def pytest_collection_modifyitems(items):
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture(scope="session", autouse=True)
def _imports_stay():
    """Spare the collector what is imported by now: to look at it all again after a test takes a third of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _exporters_are_not_covered():
    """Switch coverage off in what is hardly ours: it makes Python nearly twice as slow. See ``no_cover``, too."""
    with pytest.MonkeyPatch.context() as patch:
        if sys.gettrace():
            import nncf
            import torch

            for module, name in ((torch.onnx, "export"), (nncf, "quantize")):
                patch.setattr(module, name, untraced()(getattr(module, name)))
        yield


@contextmanager
def untraced():
    trace = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(trace)


@pytest.fixture(autouse=True)
def _seed_and_clean(request):
    import torch

    torch.manual_seed(7)
    yield
    if "tmp_path" in request.fixturenames:
        gc.collect()  # a trainer and its model hold each other: all tests together came to 11 GB


@pytest.fixture
def undrawn(monkeypatch):
    """Make new weights 0: to draw those of a WideResNet takes seconds, and not all tests need any."""
    import torch

    for draw in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, draw, lambda weight, *_, **__: weight.zero_())


@pytest.fixture
def golden():
    """Read reference values of the official code: arrays by name, lists of scales by ``scales(name)``."""
    return Golden


class Golden:
    """One file of reference values."""

    def __init__(self, name: str) -> None:
        self.arrays = np.load(GOLDEN / f"{name}.npz")

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.arrays[name])

    def scales(self, name: str, *, requires_grad: bool = False) -> list[torch.Tensor]:
        return [self[f"{name}{i}"].requires_grad_(requires_grad) for i in range(3)]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """Folder data: 6 normal images to train on; 4 normal ones, 4 with a bright square and its mask to test on."""
    root = tmp_path_factory.mktemp("tiny")
    generator = np.random.default_rng(0)
    for folder, count in (("train/good", 6), ("test/good", 4), ("test/square", 4)):
        (root / folder).mkdir(parents=True)
        (root / "ground_truth/square").mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = generator.integers(90, 120, (80, 96, 3), dtype=np.uint8)
            if folder == "test/square":
                pixels[20:50, 30:60] = 250
                mask = np.zeros((80, 96), np.uint8)
                mask[20:50, 30:60] = 255
                Image.fromarray(mask).save(root / "ground_truth/square" / f"{i}.png")
            Image.fromarray(pixels).save(root / folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def make_tiny_data(tiny_folder):
    """Make a datamodule of the tiny images, two batches of three to train on."""
    from anomalib.data import Folder
    from tiny import FOLDERS

    def make() -> Folder:
        batches = {"train_batch_size": 3, "eval_batch_size": 3, "num_workers": 0}
        return Folder(name="tiny", root=tiny_folder, **FOLDERS, **batches)

    return make


@pytest.fixture
def tiny_data(make_tiny_data) -> Folder:
    """Datamodule of the tiny images, of this test alone."""
    return make_tiny_data()
