"""Network of AAND: an amplifier stands between teacher and student.

Written from the paper, not from its official code: Tang et al., IEEE TIP 2026 (arXiv 2405.02068).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from anomalib.data import InferenceBatch
from torch import nn
from torch.nn import functional

from anomalib_rdpp.anomaly_map import AnomalyMapGenerator
from anomalib_rdpp.student import build_student
from anomalib_rdpp.teacher import Teacher, check_images

from .amplifier import Amplifier


class AmplifierFeatures(NamedTuple):
    """What the loss of stage one looks at, lists over scales, fine to coarse."""

    teacher: list[torch.Tensor]  # (B, C, H, W)
    amplified: list[torch.Tensor]  # (B, C, H, W)
    gates: list[torch.Tensor]  # (B, 1, H, W), empty without gate


class StudentFeatures(NamedTuple):
    """What the loss of stage two compares. Each a list of ``(B, C, H, W)`` per scale, fine to coarse."""

    amplified: list[torch.Tensor]
    student: list[torch.Tensor]


class AANDModel(nn.Module):
    """Teacher, amplifiers, student; which of the last two is trained, and what the map compares, is the stage.

    A new model is in stage two. The stage goes with the state dict.

    The arguments, and what they raise, are those of ``AAND`` by the same names; ``is_gated`` is its ``gate``.

    Examples:
        >>> model = AANDModel("resnet18", pre_trained=False).eval()
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
        is_gated: bool = True,
        fixed_scale: float | None = None,
        score: str = "top",
        score_fraction: float = 0.01,
    ) -> None:
        super().__init__()
        self.anomaly_map_generator = AnomalyMapGenerator(score=score, score_fraction=score_fraction)
        self.teacher = Teacher(backbone, pre_trained, teacher_weights)
        self.amplifiers = nn.ModuleList(Amplifier(count, is_gated, fixed_scale) for count in self.teacher.channels)
        self.student = build_student(self.teacher, student, width, score=score)
        # By name, because teacher and unused parts of the student are frozen in every stage.
        self.trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        self.is_amplifying = False

    def start_stage(self, is_amplifying: bool) -> None:
        """Train the amplifiers and freeze the student, or the other way round."""
        self.is_amplifying = is_amplifying
        trained = "amplifiers" if is_amplifying else "student"
        for name, parameter in self.named_parameters():
            parameter.requires_grad = name in self.trainable and name.startswith(trained)
        self.train(self.training)

    def train(self, mode: bool = True) -> "AANDModel":
        """Keep in eval mode what the stage doesn't train: its statistics must not drift."""
        super().train(mode)
        (self.student if self.is_amplifying else self.amplifiers).eval()
        return self

    def forward(
        self, images: torch.Tensor, masks: torch.Tensor | None = None
    ) -> AmplifierFeatures | StudentFeatures | InferenceBatch:
        """Give the loss of the stage its features in training, map and score in evaluation.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1], H and W multiples of 32.
            masks: ``(B, 1, H, W)``, the synthetic anomalies of stage one, in place of the gates.

        Returns:
            ``AmplifierFeatures`` or ``StudentFeatures`` in ``train()``, ``InferenceBatch`` in ``eval()``: in stage one
            from raw and amplified teacher, in stage two from amplified teacher and student.

        Raises:
            ValueError: If the images have not three channels or their sides are no multiples of 32.
        """
        check_images(images)
        teacher = self.teacher(images, may_keep=self.training and not self.is_amplifying)
        amplified, gates = self.amplify(teacher, masks)
        if self.is_amplifying:
            if self.training:
                return AmplifierFeatures(teacher, amplified, gates)
            compared = teacher, amplified
        else:
            compared = self.student.compared(amplified, is_counted=self.training), self.student(amplified)
            if self.training:
                return StudentFeatures(*compared)
        prediction: InferenceBatch = self.anomaly_map_generator(*compared, images.shape[-2:])
        return prediction

    def amplify(
        self, teacher: list[torch.Tensor], masks: torch.Tensor | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Amplify each scale; same shapes, and the gates ``(B, 1, H, W)`` of each."""
        pairs = [
            amplify(feature, None if masks is None else mask_at_scale(masks, feature))
            for amplify, feature in zip(self.amplifiers, teacher, strict=True)
        ]
        return [amplified for amplified, _ in pairs], [gate for _, gate in pairs if gate is not None]

    def get_extra_state(self) -> torch.Tensor:
        """Put the stage into the state dict."""
        return torch.tensor(self.is_amplifying)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take the stage from a state dict."""
        self.start_stage(bool(state))


def mask_at_scale(mask: torch.Tensor, feature: torch.Tensor, threshold: float = 0.3) -> torch.Tensor:
    """Bring a mask ``(B, 1, H, W)`` to a feature's size: boolean, where more than ``threshold`` of its pixels is set.

    0.3 is the official code's.
    """
    height, width = feature.shape[-2:]
    return functional.adaptive_avg_pool2d(mask.float(), (height, width)) > threshold
