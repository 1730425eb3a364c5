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

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from anomalib.models.components.backbone import get_decoder
from anomalib.models.image.reverse_distillation.components import get_bottleneck_layer
from timm.layers import ConvNormAct
from timm.models.resnet import BasicBlock
from torch import nn

from anomalib_rdpp.teacher import STRIDE, Teacher, check, check_choice

PAPER = ("resnet18", "resnet34", "resnet50", "wide_resnet50_2")  # teachers that the papers' student mirrors
BOTTLENECKS = ("mff+oce", "oce", "none")
SCALES = (1, 2, 3)


class Student(nn.Module):
    """Bottleneck and decoder of the papers, for one of their four ResNets.

    Args:
        architecture: timm name of the teacher, without tag.
        bottleneck: Its parts, as of ``build_student``.
        scales: The scales that are given back, as of ``build_student``.

    Examples:
        >>> student = Student("resnet18")
        >>> features = [torch.rand(2, 64, 16, 16), torch.rand(2, 128, 8, 8), torch.rand(2, 256, 4, 4)]
        >>> [tuple(feature.shape) for feature in student(features)]
        [(2, 64, 16, 16), (2, 128, 8, 8), (2, 256, 4, 4)]
    """

    def __init__(self, architecture: str, bottleneck: str = "mff+oce", scales: Sequence[int] = SCALES) -> None:
        super().__init__()
        width = 128 if "wide" in architecture else 64  # anomalib builds a wide ResNet's neck at half unless it is told
        neck: Any = get_bottleneck_layer(architecture, width_per_group=width)
        # Parts of the published neck that no pass uses; frozen, so that DDP waits for no gradient of theirs.
        neck.conv4.requires_grad_(requires_grad=False)
        neck.bn4.requires_grad_(requires_grad=False)
        first, coarsest = neck.bn_layer[0], neck.bn2.num_features
        if bottleneck != "mff+oce":
            first.conv1, first.downsample[0] = (_narrow(conv, coarsest) for conv in (first.conv1, first.downsample[0]))
            neck = Coarsest(neck.bn_layer if bottleneck == "oce" else first.downsample)
        self.bottleneck: nn.Module = neck
        self.decoder: nn.Module = get_decoder(architecture)
        self.scales = tuple(scales)
        self.standardise: Standardise | None = None
        self._freeze_unused([self.decoder.layer1, self.decoder.layer2, self.decoder.layer3])

    def _freeze_unused(self, steps: Any, heads: Any = ()) -> None:  # noqa: ANN401  attributes of modules have no types
        """Freeze what no scale that is given back comes from, coarse to fine: DDP waits for all gradients."""
        unused = [*steps[len(SCALES) + 1 - min(self.scales) :]]
        unused += [head for scale, head in zip(reversed(SCALES), heads, strict=False) if scale not in self.scales]
        for part in unused:
            part.requires_grad_(requires_grad=False)

    def compared(self, features: list[torch.Tensor], is_counted: bool = False) -> list[torch.Tensor]:
        """Choose those of the three scales that the student gives back, and the coarsest standardised, if it counts.

        Args:
            features: ``(B, C, H, W)`` of all three scales, fine to coarse.
            is_counted: Whether they are what mean and deviation are to be taken of: the target, in training.
        """
        chosen = [features[scale - 1] for scale in self.scales]
        again = [] if self.standardise is None else [self.standardise(chosen[-1], is_counted)]
        return chosen + again

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Reconstruct what is ``compared`` from the teacher's features ``(B, C, H, W)`` per scale, fine to coarse.

        Raises:
            ValueError: In training, if a batch of one 32 x 32 image leaves BatchNorm no second value.
        """
        if self.training and features[-1][:, 0].numel() == 4:  # 2 x 2, halved once more inside the bottleneck
            msg = (
                f"A training batch of one {STRIDE} x {STRIDE} image leaves BatchNorm one value per channel: take "
                "larger images, or a batch size that leaves no last batch of one image."
            )
            raise ValueError(msg)
        return self.compared(self.decoder(self.bottleneck(features)))


class Standardise(nn.Module):
    """Bring each channel to mean 0 and deviation 1, those of all batches that were counted, each alike.

    Channels that hardly differ between normal images then weigh as much in a cosine as those that do. Statistics are
    buffers: checkpoints and exports have them. EfficientAD (Batzner et al., WACV 2024) treats its teacher so.
    """

    count: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))  # of batches
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("variance", torch.ones(channels, 1, 1))

    def forward(self, features: torch.Tensor, is_counted: bool = False) -> torch.Tensor:
        """Standardise ``(B, C, H, W)``, in single precision; first take them into the statistics if they count."""
        features = features.float()
        if is_counted:
            variance, mean = torch.var_mean(features.detach(), dim=(0, 2, 3), correction=0)
            self.count += 1
            share, shift = 1 / self.count, mean[:, None, None] - self.mean
            self.variance += share * (variance[:, None, None] + (1 - share) * shift.square() - self.variance)
            self.mean += share * shift
        least = (0.01 * self.variance.mean()).clamp_min(1e-12)  # what hardly ever moves isn't all that counts
        standardised: torch.Tensor = (features - self.mean) / (self.variance + least).sqrt()
        return standardised


class Coarsest(nn.Sequential):
    """A bottleneck without fusion: it sees the coarsest scale alone."""

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Embed the last of ``(B, C, H, W)`` per scale, at half its height and width."""
        embedding: torch.Tensor = super().forward(features[-1])  # type: ignore[no-untyped-call]
        return embedding


class LightStudent(Student):
    """Bottleneck and decoder for a teacher of any widths, with a fraction of the papers' multiply-adds.

    Args:
        channels: Channels of the teacher at the three scales, fine to coarse.
        width: Channels inside, relative to the teacher's; or such a number for each scale, fine to coarse.
        bottleneck: Its parts, as of ``build_student``.
        scales: The scales that are given back, as of ``build_student``.
        is_cascade: Whether the finer scales learn from what the coarser ones leave, without shaping it.

    Examples:
        >>> student = LightStudent([24, 40, 112], width=0.5)
        >>> features = [torch.rand(2, 24, 16, 16), torch.rand(2, 40, 8, 8), torch.rand(2, 112, 4, 4)]
        >>> [tuple(feature.shape) for feature in student(features)]
        [(2, 24, 16, 16), (2, 40, 8, 8), (2, 112, 4, 4)]
    """

    def __init__(
        self,
        channels: Sequence[int],
        width: float | Sequence[float] = 1.0,
        bottleneck: str = "mff+oce",
        scales: Sequence[int] = SCALES,
        is_cascade: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        eighths = np.round(np.multiply(width, channels) / 8)  # whole vectors of an edge CPU
        widths = np.maximum(8, 8 * eighths).astype(int).tolist()
        if bottleneck == "mff+oce":
            self.bottleneck = nn.Sequential(Fuse(channels, widths), Embedding(widths[-1]))
        elif bottleneck == "oce":
            self.bottleneck = Coarsest(ConvNormAct(channels[-1], widths[-1], 1), Embedding(widths[-1]))
        else:
            self.bottleneck = Coarsest(_shortcut(channels[-1], 2 * widths[-1]))
        self.decoder = Decoder(widths, channels, min(scales), is_cascade)
        self.scales = tuple(scales)
        self.standardise = None
        self._freeze_unused(self.decoder.steps, self.decoder.heads)


class Fuse(nn.Module):
    """Bring each scale to 1/16 by strided convolutions and join them by a 1x1 convolution (RD's MFF, any widths)."""

    def __init__(self, channels: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            nn.Sequential(
                ConvNormAct(count, widths[k], 1),
                *(ConvNormAct(widths[i], widths[i + 1], 3, stride=2) for i in range(k, len(widths) - 1)),
            )
            for k, count in enumerate(channels)
        )
        self.join = ConvNormAct(len(widths) * widths[-1], widths[-1], 1)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Fuse ``(B, C, H, W)`` per scale to ``(B, widths[-1], H/16, W/16)``."""
        scaled = [scale(feature) for scale, feature in zip(self.scales, features, strict=True)]
        fused: torch.Tensor = self.join(torch.cat(scaled, dim=1))
        return fused


class Embedding(BasicBlock):
    """A strided residual block to 1/32, twice as wide (RD's OCE, any width)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 2 * width, 2, _shortcut(width, 2 * width))


class Decoder(nn.Module):
    """From the embedding at 1/32 up to the teacher's scales: transposed convolution, residual block, 1x1 out.

    What is finer than ``finest`` isn't computed: zeros stand in its place. In a cascade no gradient goes from a finer
    scale to a coarser one, so that the coarsest alone decides what passes the bottleneck.
    """

    def __init__(
        self, widths: Sequence[int], channels: Sequence[int], finest: int = 1, is_cascade: bool = False
    ) -> None:
        super().__init__()
        self.finest, self.is_cascade = finest, is_cascade
        wider = [*widths[1:], 2 * widths[-1]]
        scales = list(zip(wider, widths, channels, strict=True))[::-1]  # coarse to fine
        self.steps = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(deeper, width, 2, 2, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                BasicBlock(width, width),
            )
            for deeper, width, _ in scales
        )
        self.heads = nn.ModuleList(nn.Conv2d(width, count, 1) for _, width, count in scales)

    def forward(self, embedding: torch.Tensor) -> list[torch.Tensor]:
        """Reconstruct ``(B, C, H, W)`` per scale, fine to coarse, from ``(B, 2 * widths[-1], H/32, W/32)``."""
        reconstructed: list[torch.Tensor] = []
        for step, head in list(zip(self.steps, self.heads, strict=True))[: len(self.steps) + 1 - self.finest]:
            embedding = step(embedding.detach() if self.is_cascade and reconstructed else embedding)
            reconstructed.insert(0, head(embedding))
        return [embedding.new_zeros(())] * (self.finest - 1) + reconstructed


def build_student(
    teacher: Teacher,
    student: str = "auto",
    width: float | Sequence[float] = 1.0,
    bottleneck: str = "mff+oce",
    scales: Sequence[int] = SCALES,
    score: str = "top",
) -> Student:
    """Build the student of a teacher.

    Args:
        teacher: Gives channels and architecture.
        student: ``paper`` for the papers' ResNet parts, ``light`` for the generic ones, ``cascade`` for these with
            gradients that end at each scale, ``auto`` for the papers' where the teacher is one of their four ResNets
            and the light one for all others.
        width: Channels inside the light student, relative to the teacher's: one number, or one of each scale.
        bottleneck: ``mff+oce`` for RD's fusion of the scales and its residual stage, ``oce`` for that stage on the
            coarsest scale alone, ``none`` for no more than the stage's strided 1x1 convolution.
        scales: Which of the scales 1 to 3, fine to coarse, the student gives back and the map compares.
        score: ``standardised`` for a student that is compared by the standardised coarsest scale too.

    Raises:
        ValueError: If there is no such student, bottleneck or scale, the teacher has no student in the papers, or a
            width is not positive.
    """
    check_choice("student", student, ("auto", "paper", "light", "cascade"))
    check_choice("bottleneck", bottleneck, BOTTLENECKS)
    if not scales or sorted(set(scales)) != list(scales) or not set(scales) <= set(SCALES):
        msg = f"scales must be some of {list(SCALES)}, each once, fine to coarse; got {list(scales)}."
        raise ValueError(msg)
    is_width = np.shape(width) in {(), (len(SCALES),)} and bool(np.all(np.greater(width, 0) & np.isfinite(width)))
    said = f"{width}: it is the light student's channels relative to the teacher's"
    check(is_width, "width", "above 0, one number or one of each scale", said)
    has_paper = teacher.architecture in PAPER
    if student == "paper" and not has_paper:
        msg = f"The papers have no student for '{teacher.architecture}', only for {', '.join(PAPER)}; take 'light'."
        raise ValueError(msg)
    if student in {"light", "cascade"} or not has_paper:
        built: Student = LightStudent(teacher.channels, width, bottleneck, scales, student == "cascade")
    elif np.any(np.not_equal(width, 1)):
        msg = f"width {width} is an option of the light student; the papers' has width 1: take student='light'."
        raise ValueError(msg)
    else:
        built = Student(teacher.architecture, bottleneck, scales)
    if score == "standardised":
        built.standardise = Standardise(teacher.channels[built.scales[-1] - 1])
    return built


def _shortcut(width_in: int, width_out: int) -> nn.Module:
    """Build the strided 1x1 convolution with BatchNorm of a residual stage, all that is left of it without OCE."""
    return ConvNormAct(width_in, width_out, 1, stride=2, apply_act=False)


def _narrow(conv: Any, channels: int) -> nn.Conv2d:  # noqa: ANN401  attributes of modules have no types
    """Build the same convolution for fewer inputs, initialised as anomalib does."""
    narrow = nn.Conv2d(channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)
    nn.init.kaiming_normal_(narrow.weight, mode="fan_out", nonlinearity="relu")
    return narrow
