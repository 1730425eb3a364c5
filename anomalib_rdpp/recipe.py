"""Two recipes of training: the papers', and a fast one that is at its best when training ends, whatever ends it.

``paper``: Adam with betas 0.5 and 0.999; RD's rate stays, AAND's falls within its stages.

``fast``: AdamW, a warm-up, a cosine to nearly 0, and little gradient for the positions that are already learnt. What
both follow is the share of training that is over, by epochs, steps or time (``--trainer.max_time``).

Sources of the fast one: AdamW's numbers and hard mining from Guo et al., ReContrast, NeurIPS 2023; the share of easy
positions from Guo et al., Dinomaly, CVPR 2025, section 3.4.
"""

import math
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from torch.nn import Module
from torch.optim import Adam, AdamW, Optimizer


def build_optimizer(owner: LightningModule, parts: Sequence[Module], rates: Sequence[float]) -> Optimizer:
    """Build the optimiser of the owner's recipe for parts of its network, with rates of their own.

    Parts without parameters are left out. On a CPU it is fused, which is faster, unless the trainer clips gradients:
    Lightning refuses to clip those of a fused one under AMP.
    """
    fused = owner.device.type == "cpu" and not getattr(getattr(owner, "_trainer", None), "gradient_clip_val", None)
    groups = [{"params": list(part.parameters()), "lr": rate} for part, rate in zip(parts, rates, strict=True)]
    groups = [group for group in groups if group["params"]]
    if owner.hparams["recipe"] == "paper":
        return Adam(groups, betas=(0.5, 0.999), fused=fused)  # of all three papers' official code
    return AdamW(groups, betas=(0.9, 0.999), eps=1e-10, weight_decay=1e-5, fused=fused)  # ReContrast


def training_progress(trainer: Trainer) -> float:
    """Share of training that is over, from 0 to 1: by steps or by time, whichever will end it sooner."""
    total = trainer.estimated_stepping_batches
    progress = trainer.global_step / total if 0 < total < math.inf else 0.0
    if total < 0:  # data of unknown length
        progress = trainer.current_epoch / max(trainer.max_epochs or 1, 1)
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # of max_time
    for timer in timers:
        elapsed, remaining = timer.time_elapsed(), timer.time_remaining()
        if remaining is not None:
            progress = max(progress, elapsed / max(elapsed + remaining, 1e-9))
    if timers and trainer.world_size > 1:  # the clocks of processes differ, their steps must not
        progress = trainer.strategy.broadcast(progress)
    return min(progress, 1.0)


def cosine_factor(progress: float, warm_up: float = 0.1, least: float = 0.02) -> float:
    """What the learning rate is multiplied by: up to 1 within the warm-up, then a cosine down to ``least``."""
    if progress < warm_up:
        return max(progress / warm_up, least)
    return least + (1 - least) * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up))) / 2


def easy_share(progress: float, most: float = 0.9, rise: float = 0.2) -> float:
    """Share of the positions that count as learnt; it rises to ``most`` within the first fifth of training."""
    return most * min(progress / rise, 1.0)


def focus_on_hard(
    student: list[torch.Tensor], target: list[torch.Tensor], share: float, factor: float = 0.1
) -> list[torch.Tensor]:
    """Scale down the gradients at the easiest positions; the values stay.

    Args:
        student: ``(B, C, H, W)`` per scale.
        target: What it is to give back, the same shapes.
        share: Share of a batch's positions, those of the smallest 1 - cosine, that count as easy.
        factor: On their gradients; Dinomaly's.

    Returns:
        The student's features, to be compared with the target by any loss.
    """
    if share <= 0:
        return student
    focused = []
    for learner, teacher in zip(student, target, strict=True):
        with torch.no_grad():
            pairs = (learner, teacher), (learner, learner), (teacher, teacher)
            # Cosine along channels; torch's own takes seven times as long on a CPU.
            dot, *squares = ((x * y).sum(dim=1, keepdim=True) for x, y in pairs)
            distance = 1 - dot / (squares[0] * squares[1]).sqrt().clamp_min(1e-8)  # (B, 1, H, W)
            easiest = max(1, round(share * distance.numel()))
            weight = torch.where(distance <= distance.flatten().kthvalue(easiest).values, factor, 1.0)
        fixed = learner.detach()
        focused.append(fixed + weight * (learner - fixed))
    return focused
