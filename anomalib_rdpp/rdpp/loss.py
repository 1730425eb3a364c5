"""Loss of RD++: distillation plus the three terms of the projection.

Source: Tien et al., CVPR 2023, equations 2 to 6; weights and the contrast term's margin from the official code (MIT).
"""

import torch
from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss
from geomloss import SamplesLoss
from torch import nn
from torch.nn import functional

from anomalib_rdpp.recipe import focus_on_hard
from anomalib_rdpp.teacher import check

from .torch_model import RDPPFeatures

PUBLISHED_WEIGHTS = 1 + 0.01 + 0.1  # the official code divides the projection loss by the sum of its terms' weights


class RDPPLoss(nn.Module):
    """Weigh and name the terms.

    ``distillation + projection_weight * (transport_weight * transport + reconstruction_weight * reconstruction +
    contrast_weight * contrast) / 1.11``

    The arguments are those of ``RDPP`` by the same names.

    Raises:
        ValueError: If a weight is negative or the number of positions not positive.

    Examples:
        >>> features = [torch.rand(2, 8, 4, 4)]
        >>> terms = RDPPLoss()(RDPPFeatures(features, features, features, features, features))
        >>> sorted(terms)
        ['contrast', 'distillation', 'loss', 'reconstruction']
    """

    def __init__(
        self,
        projection_weight: float = 0.2,
        transport_weight: float = 0.0,
        reconstruction_weight: float = 0.01,
        contrast_weight: float = 0.1,
        transport_positions: int = 64,
    ) -> None:
        super().__init__()
        self.weights = {
            "projection_weight": projection_weight,
            "transport_weight": transport_weight,
            "reconstruction_weight": reconstruction_weight,
            "contrast_weight": contrast_weight,
        }
        for name, weight in self.weights.items():
            check(0 <= weight < float("inf"), name, "0 or more and finite", weight)
        check(transport_positions >= 1, "transport_positions", "1 or more", transport_positions)
        self.transport_positions = transport_positions
        self.distillation = ReverseDistillationLoss()

    def forward(self, features: RDPPFeatures, easy_share: float = 0.0) -> dict[str, torch.Tensor]:
        """Compute all terms.

        Args:
            features: What the model gives in training.
            easy_share: Share of the positions that give the student little gradient, see ``focus_on_hard``.

        Returns:
            Each term as a scalar by its name, unweighted, and ``loss``, their weighted sum. Plain RD has no noisy
            features and no term but ``distillation``.
        """
        with torch.autocast(features.teacher[0].device.type, enabled=False):
            teacher, noisy_teacher, projected, noisy_projected, student = (
                [feature.float().contiguous() for feature in scales] for scales in features
            )
            terms = {"distillation": self.distillation(teacher, focus_on_hard(student, teacher, easy_share))}
            if noisy_projected:
                terms["reconstruction"] = reconstruction_loss(noisy_projected, projected)
                terms["contrast"] = contrast_loss(noisy_teacher, projected)
                if self.weights["transport_weight"]:
                    terms["transport"] = transport_loss(projected, self.transport_positions)
            projection = sum(
                self.weights[f"{name}_weight"] * term for name, term in terms.items() if name != "distillation"
            )
            terms["loss"] = terms["distillation"] + self.weights["projection_weight"] * projection / PUBLISHED_WEIGHTS
        return terms


def reconstruction_loss(noisy_projected: list[torch.Tensor], projected: list[torch.Tensor]) -> torch.Tensor:
    """1 - cosine along channels of noisy and normal projections ``(B, C, H, W)``, mean of positions, sum of scales."""
    finest, *others = (
        (1 - functional.cosine_similarity(noisy, normal)).mean()
        for noisy, normal in zip(noisy_projected, projected, strict=True)
    )
    return sum(others, finest)


def contrast_loss(
    noisy_teacher: list[torch.Tensor], projected: list[torch.Tensor], margin: float = 0.5
) -> torch.Tensor:
    """Cosine of noisy teacher and normal projection ``(B, C, H, W)``, each image flattened, as far as above margin."""
    finest, *others = (
        functional.relu(functional.cosine_similarity(noisy.flatten(1), normal.flatten(1)) - margin).mean()
        for noisy, normal in zip(noisy_teacher, projected, strict=True)
    )
    return sum(others, finest)


def transport_loss(projected: list[torch.Tensor], positions: int = 64) -> torch.Tensor:
    """Debiased Sinkhorn divergence between the projected features of pairs of images of a batch.

    Each image is a cloud of feature vectors of unit length, one per position; its partner is the next image of the
    (shuffled) batch. A batch of one has no pairs and costs 0. Where the official code compares a batch with itself in
    another order, which is always 0, this is the paper's "pair-wise feature spaces in a mini-batch" (section 3.3).

    Args:
        projected: ``(B, C, H, W)`` per scale.
        positions: Random positions that are drawn at each scale, the same for all images of the batch.

    Returns:
        Mean over the pairs, summed over scales.
    """
    if len(projected[0]) == 1:
        return projected[0].new_zeros(())
    # Unit vectors are at most 2 apart: seven annealing steps lead from there to the blur.
    divergence = SamplesLoss("sinkhorn", p=2, blur=0.05, scaling=0.5, diameter=2, backend="tensorized")
    loss = projected[0].new_zeros(())
    for feature in projected:
        chosen = torch.randperm(feature[0, 0].numel(), device=feature.device)[:positions]
        cloud = functional.normalize(feature.flatten(2)[:, :, chosen], dim=1).transpose(1, 2).contiguous()  # (B, N, C)
        loss = loss + divergence(cloud, cloud.roll(1, dims=0)).mean()
    return loss
