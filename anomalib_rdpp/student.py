"""Student: learns to give back the teacher's features of normal images; RD, RD++ and AAND share it.

The three methods are one graph with one varying part: what stands between teacher and student.

===== =============================== =========================== ===================================
method student sees                    map compares                trained
===== =============================== =========================== ===================================
RD    teacher features                teacher with student        student
RD++  projected teacher features      teacher with student        projection, student
AAND  amplified teacher features      amplified with student      I: amplifier, II: student
===== =============================== =========================== ===================================

Source: Deng & Li, Anomaly Detection via Reverse Distillation from One-Class Embedding, CVPR 2022.
"""

import torch
from anomalib.models.components.backbone import get_decoder
from anomalib.models.image.reverse_distillation.components import get_bottleneck_layer
from torch import nn

from anomalib_rdpp.teacher import STRIDE, architecture


class Student(nn.Module):
    """Bottleneck and decoder: learns to give back the teacher's features of normal images.

    Args:
        backbone: timm name of the teacher.

    Examples:
        >>> student = Student("resnet18")
        >>> features = [torch.rand(2, 64, 16, 16), torch.rand(2, 128, 8, 8), torch.rand(2, 256, 4, 4)]
        >>> [tuple(feature.shape) for feature in student(features)]
        [(2, 64, 16, 16), (2, 128, 8, 8), (2, 256, 4, 4)]
    """

    def __init__(self, backbone: str) -> None:
        super().__init__()
        name = architecture(backbone)
        # The host builds the neck of a wide ResNet at half its width unless it is told.
        self.bottleneck = get_bottleneck_layer(name, width_per_group=128 if name.startswith("wide") else 64)
        self.decoder = get_decoder(name)
        # Parts of the published neck that no pass uses; frozen, so that DDP waits for no gradient of theirs.
        self.bottleneck.conv4.requires_grad_(requires_grad=False)
        self.bottleneck.bn4.requires_grad_(requires_grad=False)

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Reconstruct the teacher's features from ``(B, C, H, W)`` per scale, fine to coarse; same shapes.

        Raises:
            ValueError: In training, if a batch of one 32 x 32 image leaves BatchNorm no second value.
        """
        if self.training and features[-1][:, 0].numel() == 4:  # 2 x 2, halved once more inside the bottleneck
            msg = (
                f"A training batch of one {STRIDE} x {STRIDE} image leaves BatchNorm one value per channel: take "
                "larger images, or a batch size that leaves no last batch of one image."
            )
            raise ValueError(msg)
        return self.decoder(self.bottleneck(features))
