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
from anomalib_rdpp.student import SCALES, build_student
from anomalib_rdpp.teacher import Teacher, check_choice, check_images


class RDPPFeatures(NamedTuple):
    """What the loss compares. Each a list of ``(B, C, H, W)`` per scale, fine to coarse; noisy ones may be none."""

    teacher: list[torch.Tensor]  # what the student is compared with, as student
    noisy_teacher: list[torch.Tensor]
    projected: list[torch.Tensor]
    noisy_projected: list[torch.Tensor]
    student: list[torch.Tensor]


class RDPPModel(nn.Module):
    """Teacher, projection, student.

    The arguments, and what they raise, are those of ``RDPP`` by the same names.

    Examples:
        >>> model = RDPPModel("resnet18", pre_trained=False).eval()
        >>> model(torch.rand(2, 3, 64, 64)).anomaly_map.shape
        torch.Size([2, 1, 64, 64])
    """

    def __init__(
        self,
        backbone: str = "wide_resnet50_2.tv_in1k",
        pre_trained: bool = True,
        teacher_weights: str | None = None,
        student: str = "auto",
        width: float | Sequence[float] = 1.0,
        projection: bool | str = True,
        score: str = "top",
        score_fraction: float = 0.01,
        bottleneck: str = "mff+oce",
        scales: Sequence[int] = SCALES,
    ) -> None:
        super().__init__()
        self.anomaly_map_generator = AnomalyMapGenerator(score=score, score_fraction=score_fraction)
        self.teacher = Teacher(backbone, pre_trained, teacher_weights)
        check_choice("projection", projection, (True, False, "light"))
        self.is_projecting = bool(projection)
        self.projections = nn.ModuleList(
            Projection(count, is_light=projection == "light") if projection else nn.Identity()
            for count in self.teacher.channels
        )
        self.student = build_student(self.teacher, student, width, bottleneck, scales, score)

    def forward(self, images: torch.Tensor, noisy_images: torch.Tensor | None = None) -> RDPPFeatures | InferenceBatch:
        """Give the loss its features in training, map and score in evaluation.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1], H and W multiples of 32.
            noisy_images: The same with pseudo-anomalies, which the projection learns to remove; training only. Without
                them, and for plain RD, there are no noisy features.

        Returns:
            ``RDPPFeatures`` in ``train()``, ``InferenceBatch`` in ``eval()``.

        Raises:
            ValueError: If the images have not three channels or their sides are no multiples of 32.
        """
        check_images(images)
        noisy_teacher: list[torch.Tensor] = []
        if self.training and self.is_projecting and noisy_images is not None:
            noisy_teacher = self.teacher(noisy_images)  # a batch of its own: twice the batch is slower on a CPU
        noisy_projected = self.project(noisy_teacher) if noisy_teacher else []

        teacher = self.teacher(images, may_keep=self.training)
        projected = self.project(teacher)
        compared = self.student.compared(teacher, is_counted=self.training)
        student = self.student(projected)
        if self.training:
            return RDPPFeatures(compared, noisy_teacher, projected, noisy_projected, student)
        prediction: InferenceBatch = self.anomaly_map_generator(compared, student, images.shape[-2:])
        return prediction

    def project(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Project each scale; same shapes."""
        return [project(feature) for project, feature in zip(self.projections, features, strict=True)]


class Projection(nn.Sequential):
    """Convolutions, each with instance norm and leaky ReLU, the last too.

    Four of 3x3 by default, the paper's: C, C/2, C/4, C/2, C channels, rounded down; three of 1x1, 3x3, 1x1 if it is
    light: C, C/4, C/4, C.

    Args:
        channels: C.
        is_light: Whether to take those with fewer multiply-adds.

    Examples:
        >>> Projection(16)(torch.rand(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(self, channels: int, is_light: bool = False) -> None:
        half, quarter = max(channels // 2, 1), max(channels // 4, 1)
        widths = [channels, quarter, quarter, channels] if is_light else [channels, half, quarter, half, channels]
        layers: list[nn.Module] = []
        for (before, after), kernel in zip(pairwise(widths), (1, 3, 1) if is_light else (3, 3, 3, 3), strict=True):
            layers += [nn.Conv2d(before, after, kernel, padding=kernel // 2), nn.InstanceNorm2d(after), nn.LeakyReLU()]
        super().__init__(*layers)
