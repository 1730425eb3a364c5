"""AAND as an anomalib model: arguments, optimiser, stages, steps.

Written from the paper, not from its program's source: Tang et al., IEEE TIP 2026 (arXiv 2405.02068).
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from anomalib_rdpp.base import DistillationMixin
from anomalib_rdpp.synthesis.blending import TextureAnomalies

from .loss import AANDLoss
from .torch_model import AANDModel


class AAND(DistillationMixin, AnomalibModule):
    """AAND: reverse distillation whose teacher is amplified where it sees anomalies.

    Two stages in one fit: first the amplifier learns from synthetic anomalies, then the student from normal images. The
    defaults are the paper's, at 256 x 256 pixels, batch size 16 and max_epochs=220. A single epoch goes to stage two.

    Args:
        backbone: Teacher network by its timm name: resnet18, resnet34, resnet50 or wide_resnet50_2, with or without
            weights tag. The papers' weights are those tagged tv_in1k; timm's untagged default is another set.
        layers: The teacher's three layers that are compared, fine to coarse.
        pre_trained: Whether the teacher takes ImageNet weights, from timm's cache or by download.
        teacher_weights: File with the teacher's state dict (.pt, .pth, .safetensors), instead of a download.
        amplifier_share: Share of the epochs that stage one takes, between 0 and 1.
        amplifier_lr: Learning rate of the amplifier, in stage one.
        student_lr: Learning rate of bottleneck and decoder, in stage two. Both rates fall to a fifth at 80 % and again
            at 90 % of their stage.
        amplification_weight: Weight of the amplification term beside the gate's focal loss, in stage one.
        hard_weight: Weight of the hard-knowledge term beside the distillation loss, in stage two.
        hard_positions: Positions of each image and scale that the hard-knowledge term looks at.
        gate: False to amplify everywhere (ablation).
        fixed_scale: Scale all attributes by this number instead of the learned one (ablation).
        anomaly_probability: Share of the training images that get a synthetic anomaly in stage one.
        texture_dir: Folder of JPEG or PNG textures for the synthetic anomalies, such as DTD; grey noise if left out.
        foreground: Where synthetic anomalies may lie: "none" for everywhere, "estimate" for what stands out from the
            image's border, which suits one object before an even background.
        foreground_dir: Folder of foreground masks instead (object not black), each with the stem of its image's file
            name and the size of its file. Pre-processor and augmentations may then resize, but not crop, flip or turn.
        pre_processor: Pre-processor, True for a resize to 256 x 256, or False. It must not normalise.
        post_processor: Post-processor, True for anomalib's, or False.
        evaluator: Evaluator, True for anomalib's metrics, or False.
        visualizer: Visualizer, True for anomalib's, or False.

    Raises:
        ValueError: If backbone, layers, weights, share, probability, foreground or ablations are not admissible.
        FileNotFoundError: If the file of teacher weights doesn't exist.

    Examples:
        >>> model = AAND(backbone="resnet18", pre_trained=False)
        >>> model.name
        'AAND'
    """

    def __init__(
        self,
        backbone: str = "wide_resnet50_2.tv_in1k",
        layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        pre_trained: bool = True,
        teacher_weights: str | None = None,
        amplifier_share: float = 100 / 220,  # epochs of stage one, of both
        amplifier_lr: float = 0.005,
        student_lr: float = 0.005,
        amplification_weight: float = 0.1,
        hard_weight: float = 1.0,
        hard_positions: int = 10,
        gate: bool = True,
        fixed_scale: float | None = None,
        anomaly_probability: float = 0.5,
        texture_dir: str | None = None,
        foreground: str = "none",
        foreground_dir: str | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        if not 0 < amplifier_share < 1:
            msg = (
                f"amplifier_share must be between 0 and 1, got {amplifier_share}: both stages need epochs; "
                f"the paper's are 100 of 220."
            )
            raise ValueError(msg)
        self.anomalies = TextureAnomalies(texture_dir, foreground, foreground_dir, anomaly_probability)
        self.model = AANDModel(backbone, layers, pre_trained, teacher_weights, gate, fixed_scale)
        self.loss = AANDLoss(amplification_weight, hard_weight, hard_positions)
        self.amplifier_epochs = 0
        self.resumed_amplifier_epochs: int | None = None

    def setup(self, stage: str) -> None:
        """Look for the folders of textures and masks, which only training needs."""
        super().setup(stage)
        if stage == "fit":
            self.anomalies.check_folders()

    def configure_optimizers(self) -> tuple[list[Adam], list[LambdaLR]]:
        """Give amplifier and student a group each, with learning rates that fall within their stage."""
        groups = [
            {"params": self.model.amplifiers.parameters(), "lr": self.hparams.amplifier_lr},
            {"params": self.model.student.parameters(), "lr": self.hparams.student_lr},
        ]
        optimizer = self.build_optimizer(groups)
        epochs = count_epochs(self.trainer)
        self.amplifier_epochs = split_epochs(epochs, self.hparams.amplifier_share)
        if self.resumed_amplifier_epochs not in (None, self.amplifier_epochs):
            rank_zero_warn(
                f"Stage two of the resumed run starts with epoch {self.resumed_amplifier_epochs}, of this one with "
                f"epoch {self.amplifier_epochs}: stages are shares of max_epochs, so resume with the same max_epochs.",
            )
        stages = (0, self.amplifier_epochs), (self.amplifier_epochs, epochs)
        factors = [partial(learning_rate_factor, first=first, last=last) for first, last in stages]
        return [optimizer], [LambdaLR(optimizer, factors)]

    def on_train_start(self) -> None:
        """Start the stage of this epoch; a fit that resumes within an epoch doesn't pass the next hook."""
        self._start_stage()

    def on_train_epoch_start(self) -> None:
        """Go on to stage two when its first epoch has come."""
        if self.model.is_amplifying != (self.current_epoch < self.amplifier_epochs):
            self._start_stage()

    def training_step(self, batch: Batch, *args: object, **kwargs: object) -> STEP_OUTPUT:
        """Compute the loss of the stage from a batch of normal images; every term is logged by name."""
        del args, kwargs
        if self.model.is_amplifying:
            images, mask, foreground = self.anomalies(batch.image, batch.image_path)
            terms = self.loss(self.model(images, mask), mask, foreground)
        else:
            terms = self.loss(self.model(batch.image))
        size = len(batch.image)
        for name, term in terms.items():
            self.log(
                f"train_{name}",
                term.detach(),
                on_step=False,
                on_epoch=True,
                prog_bar=name == "loss",
                batch_size=size,
            )
        self.log("stage", 1.0 if self.model.is_amplifying else 2.0, on_step=False, on_epoch=True, batch_size=size)
        return terms["loss"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note where stage two starts."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["amplifier_epochs"] = self.amplifier_epochs

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load, and remember where stage two was to start."""
        super().on_load_checkpoint(checkpoint)
        self.resumed_amplifier_epochs = checkpoint.get("amplifier_epochs")
        is_resuming = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        if checkpoint.get("state_dict", {}).get("model._extra_state", False) and not is_resuming:
            rank_zero_warn(
                "This checkpoint was saved in stage one: its student is untrained, and its map compares raw and "
                "amplified teacher. Resume its training, with the same max_epochs.",
            )

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:  # noqa: ANN401
        """Export as the host does; what has no student yet is exported with a warning."""
        if self.model.is_amplifying:
            rank_zero_warn(
                "This AAND is in stage one: its student is untrained, and its map compares raw and amplified."
            )
        return super().to_onnx(*args, **kwargs)

    def _start_stage(self) -> None:
        """Freeze what this epoch doesn't train, and say so."""
        is_amplifying = self.current_epoch < self.amplifier_epochs
        self.model.start_stage(is_amplifying)
        self.train()
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy):
            # DDP notes when it wraps which parameters get gradients, and waits for them.
            strategy.model = self
            strategy.configure_ddp()
        name, task = ("one", "amplifier") if is_amplifying else ("two", "student")
        rank_zero_info(
            f"AAND, epoch {self.current_epoch}: stage {name} trains the {task}; "
            f"stage two starts with epoch {self.amplifier_epochs}.",
        )


def count_epochs(trainer: Trainer) -> int:
    """Epochs until ``max_epochs`` or ``max_steps``, whichever comes first.

    Raises:
        ValueError: If neither is given.
    """
    if trainer.max_steps == -1:
        if trainer.max_epochs == -1:
            msg = "AAND divides its epochs between two stages, but max_epochs=-1 has no end; set it, or max_steps."
            raise ValueError(msg)
        return trainer.max_epochs
    trainer.fit_loop.setup_data()
    steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    epochs = math.ceil(trainer.max_steps / steps)
    return epochs if trainer.max_epochs == -1 else min(epochs, trainer.max_epochs)


def split_epochs(epochs: int, share: float) -> int:
    """Epochs of stage one: a share of all, at least one for each stage. A single epoch goes to stage two."""
    if epochs < 2:
        rank_zero_warn("One epoch holds no two stages: the amplifier stays untrained; give max_epochs=2 or more.")
        return 0
    return min(max(round(share * epochs), 1), epochs - 1)


def learning_rate_factor(
    epoch: int,
    first: int,
    last: int,
    drops: Sequence[float] = (0.8, 0.9),  # of either stage
    factor: float = 0.2,
) -> float:
    """What the learning rate is multiplied by in an epoch of a stage from ``first`` to before ``last``."""
    progress = (epoch - first) / max(last - first, 1)
    return factor ** sum(progress >= drop for drop in drops)
