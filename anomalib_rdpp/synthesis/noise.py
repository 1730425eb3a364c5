"""Simplex-noise patches, the pseudo-anomalies of RD++.

Source: Tien et al., CVPR 2023, section 3.2; the official code's numbers (MIT). Its generator is seeded once, so
that every patch is the same field from its corner; here each image has a field of its own, as the paper reads.
"""

import os

import numba
import numpy as np
import torch
from opensimplex import OpenSimplex
from torch import nn

# OpenSimplex runs in numba's threads. Those of TBB, numba's first choice once OpenVINO has loaded it, never end on a
# machine of one CPU after a DataLoader has forked: Python would hang at exit.
if "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
    numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]


class SimplexNoise(nn.Module):
    """Add fractal simplex noise to one random rectangle of each image.

    All draws come from torch's generator on the CPU, so that ``seed_everything`` rules them and no GPU waits for them.

    Args:
        strength: Factor on the noise, in units of the pixel range [0, 1]. The sum is not clipped.
        patch_min: Shortest side of the rectangle in pixels.
        patch_max: Longest side in pixels, included; never more than the image's.

    Raises:
        ValueError: If the sides are not positive and in order.

    Examples:
        >>> noisy = SimplexNoise()(torch.zeros(2, 3, 64, 64))
        >>> bool((noisy != 0).any())
        True
    """

    def __init__(self, strength: float = 0.2, patch_min: int = 10, patch_max: int = 31) -> None:
        super().__init__()
        if not 0 < patch_min <= patch_max:
            msg = f"Noise patches need sides 0 < patch_min <= patch_max, got {patch_min} and {patch_max}."
            raise ValueError(msg)
        self.strength = strength
        self.patch_min = patch_min
        self.patch_max = patch_max

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return noisy copies of ``(B, 3, H, W)`` images in [0, 1]."""
        threads = torch.get_num_threads()
        fields = torch.stack([self._field(*images.shape[1:]) for _ in images])
        torch.set_num_threads(threads)  # numba's OpenMP, as it starts, sets torch's to the number of CPUs
        return images + self.strength * fields.to(images, non_blocking=True)  # a step never waits for the GPU

    def _field(self, channels: int, height: int, width: int) -> torch.Tensor:
        """Draw one rectangle of noise on zeros, ``(C, H, W)``."""
        patch_height = _draw(min(self.patch_min, height), min(self.patch_max, height))
        patch_width = _draw(min(self.patch_min, width), min(self.patch_max, width))
        top, left = _draw(0, height - patch_height), _draw(0, width - patch_width)
        noise = simplex_noise((channels, patch_height, patch_width), _draw(0, 2**31 - 1))
        field = torch.zeros(channels, height, width)
        field[:, top : top + patch_height, left : left + patch_width] = torch.from_numpy(noise)
        return field


def simplex_noise(
    shape: tuple[int, int, int], seed: int, octaves: int = 6, persistence: float = 0.6, period: int = 32
) -> np.ndarray:
    """Make a 3-D fractal of simplex noise.

    Args:
        shape: Channels, height, width.
        seed: Which field.
        octaves: Number of fields that are summed, each of twice the frequency of the one before.
        persistence: Amplitude of each octave relative to the one before; the first has 1.
        period: Pixels per unit of the first octave.

    Returns:
        Array of ``shape``, float64, within +-2.4 for the defaults.
    """
    generator = OpenSimplex(seed)
    depth, rows, columns = (np.arange(side) / period for side in shape)
    return sum(
        persistence**octave * generator.noise3array(columns * 2**octave, rows * 2**octave, depth * 2**octave)
        for octave in range(octaves)
    )


def _draw(low: int, high: int) -> int:
    """Draw an integer from low to high, both included."""
    return int(torch.randint(low, high + 1, ()))
