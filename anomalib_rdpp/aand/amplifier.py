"""Residual anomaly amplification, what AAND puts between teacher and student.

Written from the paper, not from its official code: Tang et al., IEEE TIP 2026 (arXiv 2405.02068), stage one.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Amplifier(nn.Module):
    """Add a gated residual to the features of one scale: ``feature + gate * scale * feature``.

    Args:
        channels: C.
        is_gated: Whether a gate decides where the residual goes; without, it goes everywhere (ablation).
        fixed_scale: Constant in place of the generator's scale of each attribute (ablation); None for the generator.

    Raises:
        ValueError: If neither gate nor generator is left.

    Examples:
        >>> amplified, gate = Amplifier(16)(torch.rand(2, 16, 8, 8))
        >>> amplified.shape, gate.shape
        (torch.Size([2, 16, 8, 8]), torch.Size([2, 1, 8, 8]))
    """

    def __init__(self, channels: int, is_gated: bool = True, fixed_scale: float | None = None) -> None:
        super().__init__()
        if not is_gated and fixed_scale is not None:
            msg = f"Without gate and with fixed_scale={fixed_scale} nothing is left to train; take one of the two away."
            raise ValueError(msg)
        self.gate = MatchingGate(channels) if is_gated else None
        self.generator = _attribute_mlp(channels) if fixed_scale is None else None
        self.fixed_scale = fixed_scale

    def forward(
        self, feature: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Amplify where the gate, or in its place the mask, is open.

        Args:
            feature: ``(B, C, H, W)`` of the teacher.
            mask: ``(B, 1, H, W)``, the true anomalies, known while the amplifier is trained.

        Returns:
            Amplified feature ``(B, C, H, W)`` and gate ``(B, 1, H, W)``, None if there is no gate.
        """
        scale: Any = self.fixed_scale if self.generator is None else torch.tanh(self.generator(feature))
        gate = None if self.gate is None else self.gate(feature)
        strength = 1 if gate is None else gate if mask is None else mask.to(feature)
        return feature + strength * scale * feature, gate


class MatchingGate(nn.Module):
    """How anomalous each position looks: the share that anomalous keys take in its softmax over all keys.

    Args:
        channels: C.
        key_count: L of stage one, number of learned keys for normal and again for anomalous positions.
        temperature: Divides the cosines before the softmax.

    Examples:
        >>> MatchingGate(16)(torch.rand(2, 16, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, channels: int, key_count: int = 50, temperature: float = 0.2) -> None:
        super().__init__()
        self.query = _attribute_mlp(channels)
        self.keys = nn.Parameter(torch.randn(2 * key_count, channels))  # first normal, then anomalous
        self.key_count = key_count
        self.temperature = temperature

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        """Match ``(B, C, H, W)`` with the keys; ``(B, 1, H, W)`` within (0, 1)."""
        position = torch.from_numpy(position_encoding(*feature.shape[1:])).to(feature)
        query = functional.normalize(self.query(feature + position), dim=1)
        keys = functional.normalize(self.keys, dim=1)[:, :, None, None]
        matching = (functional.conv2d(query, keys) / self.temperature).softmax(dim=1)  # (B, 2L, H, W)
        return matching[:, self.key_count :].sum(dim=1, keepdim=True)


@lru_cache
def position_encoding(channels: int, height: int, width: int, base: float = 10000.0) -> np.ndarray:
    """Sines and cosines of a position, ``(C, H, W)``: half of the channels along the width, half along the height."""
    half = 2 * -(-channels // 4)  # pairs of sine and cosine; what is over of channels that 4 doesn't divide is cut off
    frequencies = base ** (-np.arange(0, half, 2) / half)
    columns, rows = (
        np.stack([function(np.outer(frequencies, np.arange(side))) for function in (np.sin, np.cos)], axis=1)
        for side in (width, height)
    )  # (half / 2, 2, side), so that sine and cosine alternate
    along_width_and_height = np.broadcast_arrays(columns.reshape(half, 1, width), rows.reshape(half, height, 1))
    return np.concatenate(along_width_and_height)[:channels].astype(np.float32)


def _attribute_mlp(channels: int, widest: int = 1024) -> nn.Sequential:
    """Three 1x1 convolutions C, h, h, C with h = min(2 C, 1024)."""
    hidden = min(2 * channels, widest)
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 1),
        nn.ReLU(),
        nn.Conv2d(hidden, hidden, 1),
        nn.ReLU(),
        nn.Conv2d(hidden, channels, 1),
    )
