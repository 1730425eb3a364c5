"""Teacher: the frozen ImageNet network whose features all three methods compare."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from anomalib.models.components import TimmFeatureExtractor
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

# Channels of layers 1 to 3, which neck and decoder of each architecture are built for.
CHANNELS = {
    "resnet18": [64, 128, 256],
    "resnet34": [64, 128, 256],
    "resnet50": [256, 512, 1024],
    "wide_resnet50_2": [256, 512, 1024],
}
STRIDE = 32  # of the deepest layer, the one inside the bottleneck


class Teacher(nn.Module):
    """Frozen ImageNet network that turns images into features at three scales.

    Images come in [0, 1]; they are normalised here and nowhere else. The network stays in eval mode and without
    gradients, whatever mode its owner is in.

    Args:
        backbone: timm name of the network, with or without weights tag; one of the architectures in ``CHANNELS``.
        layers: Three names of layers, fine to coarse.
        pre_trained: Take ImageNet weights, from timm's cache or by download. Ignored if ``weights`` is given.
        weights: File with the state dict of the whole network or of its stem and layers 1 to 3 (``.pt``, ``.pth`` or
            ``.safetensors``).

    Raises:
        ValueError: If the backbone has no decoder, the layers don't fit it, or the file doesn't hold its weights.
        FileNotFoundError: If the weights file doesn't exist.

    Examples:
        >>> teacher = Teacher("resnet18", pre_trained=False)
        >>> [tuple(feature.shape) for feature in teacher(torch.rand(1, 3, 64, 64))]
        [(1, 64, 16, 16), (1, 128, 8, 8), (1, 256, 4, 4)]
    """

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        pre_trained: bool = True,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.channels = CHANNELS[architecture(backbone)]
        if len(layers) != len(self.channels):
            msg = f"Expected three layers, fine to coarse, got {list(layers)}; use layer1, layer2, layer3."
            raise ValueError(msg)
        if weights is not None and not Path(weights).is_file():
            msg = f"No teacher weights at '{weights}': give the path of a state dict of {backbone}, or none at all."
            raise FileNotFoundError(msg)
        self.extractor = TimmFeatureExtractor(backbone, layers, pre_trained=pre_trained and weights is None)
        if self.extractor.layers != list(layers) or self.extractor.out_dims != self.channels:
            msg = (
                f"Layers {list(layers)} don't fit the bottleneck of '{backbone}', which reads features of "
                f"{self.channels} channels; use layer1, layer2, layer3."
            )
            raise ValueError(msg)
        if weights is not None:
            load_teacher_weights(self.extractor.feature_extractor, Path(weights))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(requires_grad=False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode: a teacher whose statistics drift teaches nothing."""
        del mode
        return super().train(mode=False)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Extract features.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1], H and W multiples of 32.

        Returns:
            ``(B, C, H, W)`` per scale, fine to coarse, at 1/4, 1/8 and 1/16 of the input.
        """
        images = (images - self.mean) / self.std
        if images.device.type == "cpu" and not torch.compiler.is_exporting():  # a fifth off the teacher's time
            images = images.contiguous(memory_format=torch.channels_last)
        return [feature.contiguous() for feature in self.extractor(images).values()]


def architecture(backbone: str) -> str:
    """Strip timm's weights tag: ``wide_resnet50_2.tv_in1k`` is a ``wide_resnet50_2``.

    Raises:
        ValueError: If there is no decoder for this architecture.
    """
    name = backbone.split(".", maxsplit=1)[0]
    if name not in CHANNELS:
        msg = f"Backbone '{backbone}' has no decoder; choose one of {', '.join(CHANNELS)}, with or without timm tag."
        raise ValueError(msg)
    return name


def check_images(images: torch.Tensor) -> None:
    """Refuse what would fail deep inside the network, or not at all.

    Raises:
        ValueError: If ``images`` is not ``(B, 3, H, W)`` with H and W multiples of 32.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        msg = (
            f"Expected RGB images of shape (B, 3, H, W), got {tuple(images.shape)}; repeat a grey channel three times."
        )
        raise ValueError(msg)
    if images.shape[-2] % STRIDE or images.shape[-1] % STRIDE:
        height, width = (max(STRIDE, round(side / STRIDE) * STRIDE) for side in images.shape[-2:])
        msg = (
            f"Image sides must be multiples of {STRIDE}, got {tuple(images.shape[-2:])}; resize in the pre-processor, "
            f"to {height} x {width} for instance."
        )
        raise ValueError(msg)


def load_teacher_weights(network: nn.Module, path: Path) -> None:
    """Load a state dict into the teacher; layer 4 and classifier may be there and are left out.

    Raises:
        ValueError: If the file can't be read as a state dict or is of another network.
    """
    try:
        stored = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        msg = (
            f"'{path}' is no readable state dict: it is damaged, incomplete or holds more than tensors. Save the "
            "network's state_dict() with torch.save or safetensors, or fetch the file again."
        )
        raise ValueError(msg) from error
    expected = network.state_dict()
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    wrong = [
        name
        for name, value in expected.items()
        if name not in counters
        and (not isinstance(stored, dict) or getattr(stored.get(name), "shape", None) != value.shape)
    ]
    if wrong:
        msg = (
            f"'{path}' holds the weights of another network: {len(wrong)} of {len(expected)} tensors are missing or of "
            f"another shape, the first is '{wrong[0]}'. Give the state dict of the backbone that you named."
        )
        raise ValueError(msg)
    network.load_state_dict({name: stored.get(name, value) for name, value in expected.items()})
