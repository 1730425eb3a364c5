"""Losses of AAND: focal and amplification in stage one, distillation and hard knowledge in stage two.

Written from the paper, not from its official code: Tang et al., IEEE TIP 2026 (arXiv 2405.02068).
"""

import torch
from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss
from torch import nn
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from anomalib_rdpp.recipe import focus_on_hard
from anomalib_rdpp.teacher import check

from .torch_model import AmplifierFeatures, StudentFeatures, mask_at_scale


class AANDLoss(nn.Module):
    """Weigh and name the terms of either stage.

    Stage one: ``focal + amplification_weight * amplification``; stage two: ``distillation + hard_weight * hard``.

    The arguments are those of ``AAND`` by the same names.

    Raises:
        ValueError: If a weight is negative or the number of positions not positive.

    Examples:
        >>> features = [torch.rand(2, 8, 4, 4)]
        >>> sorted(AANDLoss()(StudentFeatures(features, features)))
        ['distillation', 'hard', 'loss']
    """

    def __init__(self, amplification_weight: float = 0.1, hard_weight: float = 1.0, hard_positions: int = 10) -> None:
        super().__init__()
        for name, weight in (("amplification_weight", amplification_weight), ("hard_weight", hard_weight)):
            check(0 <= weight < float("inf"), name, "0 or more and finite", weight)
        none_at_all = f"{hard_positions}; for none at all set hard_weight to 0"
        check(hard_positions >= 1, "hard_positions", "1 or more", none_at_all)
        self.amplification_weight = amplification_weight
        self.hard_weight = hard_weight
        self.hard_positions = hard_positions
        self.distillation = ReverseDistillationLoss()

    def forward(
        self,
        features: AmplifierFeatures | StudentFeatures,
        mask: torch.Tensor | None = None,
        foreground: torch.Tensor | None = None,
        easy_share: float = 0.0,
    ) -> dict[str, torch.Tensor]:
        """Compute the terms of the stage that the features come from.

        Args:
            features: What the model gives in training.
            mask: ``(B, 1, H, W)`` of the images, the synthetic anomalies; stage one only.
            foreground: ``(B, 1, H, W)`` of the images, where the object is; stage one only.
            easy_share: Share of the positions that give the student little gradient, see ``focus_on_hard``.

        Returns:
            Each term as a scalar by its name, unweighted, and ``loss``, their weighted sum.
        """
        with torch.autocast(features.amplified[0].device.type, enabled=False):
            features = type(features)(*([feature.float().contiguous() for feature in scales] for scales in features))
            if isinstance(features, AmplifierFeatures) and mask is not None and foreground is not None:
                terms = {
                    "focal": focal_loss(features.gates, mask),
                    "amplification": amplification_loss(features.teacher, features.amplified, mask, foreground),
                }
                loss = terms["focal"] + self.amplification_weight * terms["amplification"]
            elif isinstance(features, StudentFeatures):
                student = focus_on_hard(features.student, features.amplified, easy_share)
                terms = {
                    "distillation": self.distillation(features.amplified, student),
                    "hard": hard_knowledge_loss(features.amplified, features.student, self.hard_positions),
                }
                loss = terms["distillation"] + self.hard_weight * terms["hard"]
            else:
                msg = "The features of stage one need the masks of their synthetic anomalies and of the foreground."
                raise ValueError(msg)
        return {**terms, "loss": loss}


def focal_loss(gates: list[torch.Tensor], mask: torch.Tensor, alpha: float = 0.8, gamma: float = 2.0) -> torch.Tensor:
    """Focal loss of gates ``(B, 1, H, W)`` against the mask ``(B, 1, H, W)`` of the images, summed over scales.

    ``alpha`` is the weight of anomalous positions, 1 - alpha that of normal ones.
    """
    loss = mask.new_zeros((), dtype=torch.float32)
    for gate in gates:
        anomalous = mask_at_scale(mask, gate).to(gate)
        loss = loss + sigmoid_focal_loss(torch.logit(gate, eps=1e-6), anomalous, alpha, gamma, reduction="mean")
    return loss


def amplification_loss(
    teacher: list[torch.Tensor],
    amplified: list[torch.Tensor],
    mask: torch.Tensor,
    foreground: torch.Tensor,
    margin: float = 0.3,  # in cosine, how much further amplification must push
    normal_positions: int = 5000,  # at most, per batch and scale, of the official code, as the next
    anomalous_positions: int = 1000,
) -> torch.Tensor:
    """Ask that amplified anomalies are further from normal positions than the teacher has them.

    Args:
        teacher: ``(B, C, H, W)`` per scale.
        amplified: The same shapes.
        mask: ``(B, 1, H, W)`` of the images, their anomalies.
        foreground: ``(B, 1, H, W)`` of the images; normal positions outside of it don't count.
        margin: How much further, in cosine.
        normal_positions: Normal positions that are drawn, if there are more.
        anomalous_positions: Anomalous positions that are drawn, if there are more.

    Returns:
        Mean over pairs of a normal and an anomalous position, summed over scales; 0 where there are none.
    """
    loss = mask.new_zeros((), dtype=torch.float32)
    for raw, strong in zip(teacher, amplified, strict=True):
        anomalous = mask_at_scale(mask, raw)[:, 0]
        normal = mask_at_scale(foreground, raw)[:, 0] & ~anomalous
        n, a = _draw(normal, normal_positions), _draw(anomalous, anomalous_positions)
        unit, strong_unit = (functional.normalize(f, dim=1).movedim(1, -1) for f in (raw, strong))  # (B, H, W, C)
        before, after = unit[n] @ unit[a].T, unit[n] @ strong_unit[a].T  # (normal, anomalous) positions
        excess = functional.relu(after - (before - margin))
        loss = loss + excess.sum() / max(excess.numel(), 1)  # without pairs 0 and not NaN, with gradients all the same
    return loss


def hard_knowledge_loss(
    amplified: list[torch.Tensor], student: list[torch.Tensor], positions: int = 10
) -> torch.Tensor:
    """Mean of each image's K_h (``positions``) largest 1 - cosine along channels ``(B, C, H, W)``, sum of scales."""
    loss = amplified[0].new_zeros(())
    for teacher, learner in zip(amplified, student, strict=True):
        distance = (1 - functional.cosine_similarity(teacher, learner)).flatten(1)  # (B, H * W)
        loss = loss + distance.topk(min(positions, distance.shape[1])).values.mean()
    return loss


def _draw(mask: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Indices of at most ``count`` random positions where the mask is set."""
    places = mask.nonzero()
    if len(places) > count:
        places = places[torch.randperm(len(places), device=places.device)[:count]]
    return places.unbind(dim=1)
