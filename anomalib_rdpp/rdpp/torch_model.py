"""Network of RD++: a projection stands between teacher and student.

Source: Tien et al., Revisiting Reverse Distillation for Anomaly Detection, CVPR 2023, figure 2 and section 3.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from anomalib.data import InferenceBatch
from torch import nn

from anomalib_rdpp.anomaly_map import AnomalyMapGenerator
from anomalib_rdpp.student import Student
from anomalib_rdpp.synthesis.noise import SimplexNoise
from anomalib_rdpp.teacher import Teacher, check_images


class RDPPFeatures(NamedTuple):
    """What the loss compares. Each a list of ``(B, C, H, W)`` per scale, fine to coarse; plain RD has no noisy ones."""

    teacher: list[torch.Tensor]
    noisy_teacher: list[torch.Tensor]
    projected: list[torch.Tensor]
    noisy_projected: list[torch.Tensor]
    student: list[torch.Tensor]


class RDPPModel(nn.Module):
    """Teacher, projection, student; in training also the noise that the projection learns to remove.

    Args:
        backbone: timm name of the teacher.
        layers: Its three layers, fine to coarse.
        pre_trained: Whether the teacher takes ImageNet weights.
        teacher_weights: File with the teacher's weights instead.
        noise: Adds pseudo-anomalies to images; None for the paper's.
        projection: False for plain RD (CVPR 2022), whose student sees the teacher's features as they are.

    Examples:
        >>> model = RDPPModel("resnet18", pre_trained=False).eval()
        >>> model(torch.rand(2, 3, 64, 64)).anomaly_map.shape
        torch.Size([2, 1, 64, 64])
    """

    def __init__(
        self,
        backbone: str = "wide_resnet50_2.tv_in1k",
        layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        pre_trained: bool = True,
        teacher_weights: str | None = None,
        noise: SimplexNoise | None = None,
        projection: bool = True,
    ) -> None:
        super().__init__()
        self.teacher = Teacher(backbone, layers, pre_trained, teacher_weights)
        self.is_projecting = projection
        self.projections = nn.ModuleList(
            Projection(channels) if projection else nn.Identity() for channels in self.teacher.channels
        )
        self.student = Student(backbone)
        self.anomaly_map_generator = AnomalyMapGenerator()
        self.noise = noise or SimplexNoise()

    def forward(self, images: torch.Tensor) -> RDPPFeatures | InferenceBatch:
        """Give the loss its features in training, map and score in evaluation.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1], H and W multiples of 32.

        Returns:
            ``RDPPFeatures`` in ``train()``, ``InferenceBatch`` in ``eval()``.

        Raises:
            ValueError: If the images have not three channels or their sides are no multiples of 32.
        """
        check_images(images)
        noisy_teacher, noisy_projected = [], []
        if self.training and self.is_projecting:
            noisy_teacher = self.teacher(self.noise(images))  # a batch of its own: twice the batch is slower on a CPU
            noisy_projected = self.project(noisy_teacher)

        teacher = self.teacher(images)
        projected = self.project(teacher)
        student = self.student(projected)
        if self.training:
            return RDPPFeatures(teacher, noisy_teacher, projected, noisy_projected, student)
        return self.anomaly_map_generator(teacher, student, images.shape[-2:])

    def project(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Project each scale; same shapes."""
        return [project(feature) for project, feature in zip(self.projections, features, strict=True)]


class Projection(nn.Sequential):
    """Four 3x3 convolutions C, C/2, C/4, C/2, C, each with instance norm and leaky ReLU, the last one too.

    Args:
        channels: C, a multiple of 4.

    Examples:
        >>> Projection(16)(torch.rand(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(self, channels: int) -> None:
        widths = [channels, channels // 2, channels // 4, channels // 2, channels]
        super().__init__(
            *(
                layer
                for width_in, width_out in pairwise(widths)
                for layer in (
                    nn.Conv2d(width_in, width_out, 3, padding=1),
                    nn.InstanceNorm2d(width_out),
                    nn.LeakyReLU(),
                )
            ),
        )
