"""Anomaly map: how far the student is from the teacher, at every pixel.

Per scale 1 - cosine along channels, brought to the size of the image (bilinear, corners aligned), summed over scales,
smoothed by a Gaussian. Upsampling and smoothing are linear and separable, so both together are one small matrix per
axis: nothing is computed at full resolution but the product, which is the same map for a fraction of the time.

Source: Deng & Li, CVPR 2022, section 3.4; sigma and border rule from the official code (MIT).
"""

from functools import lru_cache

import numpy as np
import torch
from anomalib.data import InferenceBatch
from scipy.ndimage import gaussian_filter1d
from torch import nn

from anomalib_rdpp.teacher import check, check_choice


class AnomalyMapGenerator(nn.Module):
    """Compare two lists of features and give map and score.

    Args:
        sigma: Standard deviation of the Gaussian, in pixels of the image. Its radius is four times that. At the border
            the image is mirrored with its edge pixel repeated, as scipy's ``reflect`` does.
        score: What of the map is the image's score: ``max``, its maximum; ``top``, the mean of its highest pixels;
            ``coarse``, the same of the coarsest scale's map alone; ``standardised``, that and the same of this scale's
            standardised features; ``sum``, the sum of all, as RD's official code for one-class detection has it.
        score_fraction: Share of the pixels that the means are of, at least one pixel.

    Raises:
        ValueError: If there is no such score, or the fraction is not above 0 and at most 1.

    Examples:
        >>> generate = AnomalyMapGenerator()
        >>> teacher, student = [torch.rand(2, 8, 16, 16)], [torch.rand(2, 8, 16, 16)]
        >>> prediction = generate(teacher, student, (64, 64))
        >>> prediction.anomaly_map.shape, prediction.pred_score.shape
        (torch.Size([2, 1, 64, 64]), torch.Size([2]))
    """

    def __init__(self, sigma: float = 4.0, score: str = "max", score_fraction: float = 0.01) -> None:
        super().__init__()
        check_choice("score", score, ("max", "top", "coarse", "standardised", "sum"))
        check(0 < score_fraction <= 1, "score_fraction", "above 0 and at most 1", score_fraction)
        self.sigma = sigma
        self.score = score
        self.score_fraction = score_fraction

    def forward(
        self, teacher: list[torch.Tensor], student: list[torch.Tensor], image_size: tuple[int, int]
    ) -> InferenceBatch:
        """Compute map and score.

        Args:
            teacher: ``(B, C, H, W)`` per scale. If the last two are of one scale, the last counts in the score alone.
            student: The same shapes.
            image_size: Height and width of the map in pixels.

        Returns:
            ``anomaly_map`` of shape ``(B, 1, *image_size)``, between 0 and twice the number of scales, and
            ``pred_score`` of shape ``(B,)``.
        """
        with torch.autocast(teacher[0].device.type, enabled=False):
            pairs = zip(teacher, student, strict=True)
            maps = [self._enlarge(_distance(t.float(), s.float()), image_size) for t, s in pairs]
        count = 2 if len(maps) > 1 and teacher[-1].shape == teacher[-2].shape else 1  # maps of the coarsest scale
        anomaly_map = sum(maps[1 : len(maps) + 1 - count], maps[0])
        scored = maps[-count:] if self.score in {"coarse", "standardised"} else [anomaly_map]
        score = torch.stack([self._score(each) for each in scored]).sum(dim=0)
        return InferenceBatch(pred_score=score, anomaly_map=anomaly_map.unsqueeze(1))

    def _score(self, anomaly_map: torch.Tensor) -> torch.Tensor:
        """Score each map ``(B, H, W)``."""
        if self.score == "max":
            return anomaly_map.amax(dim=(-2, -1))
        if self.score == "sum":
            return anomaly_map.sum(dim=(-2, -1))
        pixels = anomaly_map.flatten(1)
        return pixels.topk(max(1, round(self.score_fraction * pixels.shape[1]))).values.mean(dim=1)

    def _enlarge(self, distance: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        """Upsample and smooth ``(B, h, w)`` to ``(B, H, W)``."""
        rows, columns = (
            torch.from_numpy(enlarging_matrix(small, large, self.sigma)).to(distance.device)
            for small, large in zip(distance.shape[-2:], image_size, strict=True)
        )
        enlarged: torch.Tensor = rows @ (distance @ columns.T)
        return enlarged


def _distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """1 - cosine along channels, ``(B, H, W)``; 1 where a feature is 0.

    As half the squared distance of the features at unit length, which is the same, but keeps its digits near 0 in half
    precision: OpenVINO takes bfloat16 by itself where the CPU has it.
    """
    norms = [feature.norm(dim=1, keepdim=True) for feature in (x, y)]
    least = torch.finfo(x.dtype).tiny ** 0.5  # what is shorter counts as 0: its square is
    difference = x / norms[0].clamp_min(least) - y / norms[1].clamp_min(least)
    missing = sum((norm < least).to(x.dtype) for norm in norms).squeeze(1)  # a zero vector has no unit length
    distance: torch.Tensor = (difference.norm(dim=1).square() + missing) / 2
    return distance


@lru_cache
def enlarging_matrix(small: int, large: int, sigma: float) -> np.ndarray:
    """Matrix ``(large, small)`` that interpolates linearly, corners aligned, and smooths by a Gaussian."""
    places = np.linspace(0, small - 1, large)
    interpolate = np.stack([np.interp(places, np.arange(small), unit) for unit in np.eye(small)], axis=1)
    matrix: np.ndarray = gaussian_filter1d(interpolate, sigma, axis=0, mode="reflect").astype(np.float32)
    return matrix
