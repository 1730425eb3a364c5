"""Distances in feature space: what the student sees of pairs of images, and of images with noise.

RD++'s paper takes the mean squared error of two images' features. It depends on the features' own scale, which differs
between methods, so that 1 - cosine along channels, mean over positions, stands beside it: the same error, but for a
constant, of features of unit length.
"""

import numpy as np
import torch
from anomalib.models import AnomalibModule, ReverseDistillation
from torch.nn import functional

from anomalib_rdpp import AAND, RDPP
from anomalib_rdpp.aand.torch_model import mask_at_scale
from anomalib_rdpp.synthesis.noise import SimplexNoise

SCALES = (1, 2, 3)


def student_inputs(model: RDPP | AAND | ReverseDistillation, images: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Give the features of the teacher and those that the student sees.

    Args:
        model: Trained model.
        images: ``(B, 3, H, W)`` in [0, 1].

    Returns:
        ``teacher`` and ``student``, each ``(B, C, H, W)`` per scale, fine to coarse.
    """
    network, images = model.model, model.pre_processor(images)
    if isinstance(model, ReverseDistillation):
        teacher = list(network.encoder(images).values())
        return {"teacher": teacher, "student": teacher}
    teacher = network.teacher(images)
    seen = network.project(teacher) if isinstance(model, RDPP) else network.amplify(teacher)[0]
    return {"teacher": teacher, "student": seen}


def has_student(model: AnomalibModule) -> bool:
    """Tell whether the model is one of the family."""
    return isinstance(model, (RDPP, AAND, ReverseDistillation))


def feature_distances(
    model: RDPP | AAND | ReverseDistillation,
    normal: list[torch.Tensor],
    abnormal: list[torch.Tensor],
    seed: int,
) -> dict[str, np.ndarray]:
    """Compare features of images ``(1, 3, H, W)``: pairs of normal ones, normal with abnormal, normal with noisy."""
    torch.manual_seed(seed)
    noise = SimplexNoise()  # the paper's, whatever the model was trained with
    noisy = [noise(image) for image in normal]
    features = {
        kind: [student_inputs(model, image) for image in images]
        for kind, images in (("normal", normal), ("abnormal", abnormal), ("noisy", noisy))
    }
    changed = [(after != before).any(dim=1, keepdim=True) for before, after in zip(normal, noisy, strict=True)]
    distances = {}
    for source in ("teacher", "student"):
        for index, scale in enumerate(SCALES):
            ours, theirs, moved = (
                torch.cat([one[source][index] for one in features[kind]]) for kind in ("normal", "abnormal", "noisy")
            )
            upper = tuple(torch.triu_indices(len(ours), len(ours), 1))
            places = mask_at_scale(torch.cat(changed), ours).squeeze(1)
            found = {
                "normal_mse": _squared(ours, ours)[upper],
                "abnormal_mse": _squared(theirs, ours),
                "normal": _angular(ours, ours)[upper],
                "abnormal": _angular(theirs, ours),
                "noise": (1 - functional.cosine_similarity(moved, ours))[places],
            }
            distances |= {f"{source}_{name}_{scale}": values.flatten().numpy() for name, values in found.items()}
    return distances


def _squared(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each pair of features, ``(len(x), len(y))``."""
    x, y = x.flatten(1).double(), y.flatten(1).double()
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min(0) / x.shape[1]


def _angular(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """1 - cosine along channels, mean over positions, of each pair, ``(len(x), len(y))``."""
    positions = x[0, 0].numel()
    x, y = (functional.normalize(features).flatten(1) for features in (x, y))
    return (1 - x @ y.T / positions).clamp_min(0)
