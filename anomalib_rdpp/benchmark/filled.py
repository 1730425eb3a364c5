"""Models as training would leave them, for times: random weights, and one small function each for what fitting fills.

A grid's entry may name another function for its model, ``fill: my_module.my_function``, which is given the model, the
entry and the side of the images that the network sees, and changes the model.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import timm
import torch
from anomalib.models import AnomalibModule

from .build import build_pre_processor, class_of, sides

MH_DIMENSIONS = 690  # of 1,024: what MHPatchcore's PCA keeps on real images with ResNet-18 is 660 to 704


def build_filled(entry: dict[str, Any], backbone: str, size: int) -> AnomalibModule:
    """Build a model with random weights and fill what training would fill, or load its checkpoint."""
    model_class = class_of(entry)
    if "ckpt_path" in entry:
        return model_class.load_from_checkpoint(entry["ckpt_path"]).eval()
    known = inspect.signature(model_class).parameters
    init_args = {name: value for name, value in {"backbone": backbone, "pre_trained": False}.items() if name in known}
    init_args |= {"pre_processor": build_pre_processor(entry, size), **entry.get("init_args", {})}
    torch.manual_seed(0)
    with random_weights():
        model = model_class(**init_args).eval()
    fill = FILLS.get(model_class.__name__)
    if "fill" in entry:
        module, _, name = entry["fill"].rpartition(".")
        fill = getattr(import_module(module), name)
    if fill is not None:
        fill(model, entry, sides(model.pre_processor, size)[1])
    return model


@contextmanager
def random_weights() -> Iterator[None]:
    """Let networks have random weights, also those of models without an argument against the download."""
    create = timm.create_model
    with (
        mock.patch("timm.create_model", lambda *names, **options: create(*names, **{**options, "pretrained": False})),
        mock.patch("torchvision.models.get_model_weights", return_value=SimpleNamespace(DEFAULT=None)),
    ):
        yield


def bank_of(model: AnomalibModule) -> str:
    """Entries x channels of what a model searches, empty if it searches nothing."""
    buffers = dict(model.named_buffers())
    bank = buffers.get("model.memory_bank", buffers.get("model.memory_bank.bank", torch.tensor(0)))
    return " x ".join(map(str, reversed(bank.shape) if type(model).__name__ == "Cfa" else bank.shape))


def _bank(entry: dict[str, Any], channels: int) -> torch.Tensor:
    """Draw as many entries as the grid says."""
    if "bank" not in entry:
        msg = f"{entry['class_path']} needs `bank`, the entries of its memory bank."
        raise ValueError(msg)
    return torch.randn(entry["bank"], channels)


def _fill_patchcore(model: AnomalibModule, entry: dict[str, Any], _: int) -> None:
    model.model.memory_bank = _bank(entry, sum(model.model.feature_extractor.out_dims))


def _fill_mh_patchcore(model: AnomalibModule, entry: dict[str, Any], _: int) -> None:
    """A projection, a whitening and a bank."""
    pca, whitening, bank = model.model.pca, model.model.covariance, model.model.memory_bank
    pca.components, pca.projected_mean = torch.randn(MH_DIMENSIONS, 1024) / 32, torch.zeros(MH_DIMENSIONS)
    pca.num_components.fill_(MH_DIMENSIONS)
    whitening.mean = torch.zeros(MH_DIMENSIONS, dtype=torch.float64)
    whitening.whitening_matrix = torch.eye(MH_DIMENSIONS, dtype=torch.float64)
    bank.bank = _bank(entry, MH_DIMENSIONS)


@torch.no_grad()
def _fill_padim(model: AnomalibModule, _: dict[str, Any], size: int) -> None:
    """A Gaussian per position."""
    network, channels = model.model, len(model.model.idx)
    positions = network.feature_extractor(torch.zeros(1, 3, size, size))[network.layers[0]][0, 0].numel()
    network.gaussian.mean = torch.randn(channels, positions)
    network.gaussian.inv_covariance = torch.eye(channels).repeat(positions, 1, 1)


def _fill_cfa(model: AnomalibModule, _: dict[str, Any], size: int) -> None:
    """Centroids, by its own method from a random image."""
    model.model.initialize_centroid([SimpleNamespace(image=torch.rand(1, 3, size, size))])


FILLS = {"Patchcore": _fill_patchcore, "MHPatchcore": _fill_mh_patchcore, "Padim": _fill_padim, "Cfa": _fill_cfa}
