"""AAND as an anomalib model: arguments, optimiser, stages, steps.

Written from the paper, not from its official code: Tang et al., IEEE TIP 2026 (arXiv 2405.02068).
"""

import math
from collections.abc import Sequence
from typing import Any

from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch.optim.lr_scheduler import LambdaLR

from anomalib_rdpp.base import DistillationMixin, short_errors
from anomalib_rdpp.recipe import build_optimizer, cosine_factor, easy_share, training_progress
from anomalib_rdpp.synthesis.blending import TextureAnomalies
from anomalib_rdpp.teacher import check, check_choice

from .loss import AANDLoss
from .torch_model import AANDModel

LEARNING_RATES = {"paper": 0.005, "fast": 0.002}  # of amplifier and student, by recipe
ROUNDING = 1e-9  # of shares of the training
IN_STAGE_ONE = "in stage one: its student is untrained, and its map compares raw and amplified teacher"


class AAND(DistillationMixin, AnomalibModule):
    """AAND: reverse distillation whose teacher is amplified where it sees anomalies.

    Two stages in one fit: first the amplifier learns from synthetic anomalies, then the student from normal images. A
    single epoch goes to stage two. The defaults are the paper's but for ``score``, at 256 x 256 pixels, batch size 16
    and max_epochs=220.

    Args:
        backbone: Teacher network by its timm name, with or without weights tag: any CNN with features at strides 4, 8
            and 16. The papers' weights are those tagged tv_in1k; timm's untagged default is another set.
        pre_trained: Whether the teacher takes ImageNet weights, from timm's cache or by download.
        teacher_weights: File with the teacher's state dict (.pt, .pth, .safetensors), instead of a download.
        student: "paper" for the papers' student, which mirrors resnet18, resnet34, resnet50 or wide_resnet50_2; "light"
            for one with fewer multiply-adds for any teacher; "cascade" for the same, whose coarsest scale alone decides
            what passes the bottleneck; "auto" for the papers' where there is one.
        width: Channels inside the light student, relative to the teacher's: one number, or one of each scale.
        recipe: "paper" for the paper's optimiser, whose rates fall to a fifth at 80 % and 90 % of a stage; "fast"
            for AdamW, a warm-up and a cosine in either stage, and little gradient for what the student has
            already learnt.
        amplifier_share: Share of the training that stage one takes, between 0 and 1.
        amplifier_lr: Learning rate of the amplifier, in stage one; of the recipe by default, 0.005 or 0.002.
        student_lr: Learning rate of bottleneck and decoder, in stage two; of the recipe by default, 0.005 or 0.002.
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
        score: An image's score: "top" for the mean of its map's highest pixels, which was ahead on two data sets; "max"
            for the map's maximum, as in the papers; "sum" for the sum of all; "coarse" as "top", of the coarsest
            scale's map alone; "standardised" adds the same of this scale's features standardised, which the student
            learns too.
        score_fraction: Share of the map's pixels that score="top", "coarse" and "standardised" average.
        pre_processor: Pre-processor, True for a resize to 256 x 256, or False. It must not normalise.
        post_processor: Post-processor, True for anomalib's, or False.
        evaluator: Evaluator, True for anomalib's metrics, or False.
        visualizer: Visualizer, True for anomalib's, or False.
        layers: Of configs and checkpoints of before; has no effect.

    Raises:
        ValueError: If an argument is not admissible.
        FileNotFoundError: If the file of teacher weights doesn't exist, or ImageNet weights are nowhere to be had.

    Examples:
        >>> model = AAND(backbone="resnet18", pre_trained=False)
        >>> model.name
        'AAND'
    """

    structure = frozenset({"backbone", "student", "width", "gate", "fixed_scale"})
    model: AANDModel
    loss: AANDLoss

    def __init__(
        self,
        backbone: str = "wide_resnet50_2.tv_in1k",
        pre_trained: bool = True,
        teacher_weights: str | None = None,
        student: str = "auto",
        width: float | Sequence[float] = 1.0,
        recipe: str = "paper",
        amplifier_share: float = 100 / 220,  # epochs of stage one, of both
        amplifier_lr: float | None = None,
        student_lr: float | None = None,
        amplification_weight: float = 0.1,
        hard_weight: float = 1.0,
        hard_positions: int = 10,
        gate: bool = True,
        fixed_scale: float | None = None,
        anomaly_probability: float = 0.5,
        texture_dir: str | None = None,
        foreground: str = "none",
        foreground_dir: str | None = None,
        score: str = "top",
        score_fraction: float = 0.01,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        layers: Sequence[str] | None = None,
    ) -> None:
        with short_errors():
            super().__init__(pre_processor, post_processor, evaluator, visualizer)
            reason = f"{amplifier_share}: both stages need epochs; the paper's are 100 of 220"
            check(0 < amplifier_share < 1, "amplifier_share", "between 0 and 1", reason)
            check_choice("recipe", recipe, LEARNING_RATES)
            self.anomalies = TextureAnomalies(texture_dir, foreground, foreground_dir, anomaly_probability)
            self.loss = AANDLoss(amplification_weight, hard_weight, hard_positions)
            self.model = AANDModel(
                backbone, pre_trained, teacher_weights, student, width, gate, fixed_scale, score, score_fraction
            )
            rates = (amplifier_lr, student_lr)
            self.learning_rates = [LEARNING_RATES[recipe] if rate is None else rate for rate in rates]
            self.amplifier_epochs: int | None = 0  # None where time alone ends the training
            self.amplifier_end = 0.0  # share of the training at which stage two starts
            self.resumed_amplifier_epochs: int | None = None
            self.resumed_in_stage_two = False

    def setup(self, stage: str) -> None:
        """Look for the folders of textures and masks, which only training needs."""
        super().setup(stage)
        if stage == "fit":
            self.anomalies.check_folders()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Give amplifier and student a group each, with learning rates that fall within their stage."""
        self.amplifier_end = self.hparams["amplifier_share"]
        self.amplifier_epochs = None
        if (epochs := count_epochs(self.trainer)) is not None:
            self.amplifier_epochs = split_epochs(epochs, self.hparams["amplifier_share"])
            self.amplifier_end = self.amplifier_epochs / max(epochs, 1)
        if self.resumed_amplifier_epochs not in (None, self.amplifier_epochs):
            rank_zero_warn(
                f"Stage two of the resumed run starts with epoch {self.resumed_amplifier_epochs}, of this one with "
                f"epoch {self.amplifier_epochs}: stages are shares of max_epochs, so resume with the same max_epochs."
            )
        optimizer = build_optimizer(self, (self.model.amplifiers, self.model.student), self.learning_rates)
        is_fast = self.hparams["recipe"] == "fast"
        factor, interval = (cosine_factor, "step") if is_fast else (learning_rate_factor, "epoch")
        factors = [
            lambda _: factor(self._progress_of(0.0, self.amplifier_end)),
            lambda _: factor(self._progress_of(self.amplifier_end, 1.0)),
        ]
        schedule = LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": interval}}

    def on_train_start(self) -> None:
        """Start the stage of this epoch; a fit that resumes within an epoch doesn't pass the next hook."""
        self._start_stage()

    def on_train_epoch_start(self) -> None:
        """Go on to stage two when its first epoch has come."""
        if self.model.is_amplifying != self._is_stage_one():
            self._start_stage()

    def training_step(self, batch: ImageBatch, *_: object, **__: object) -> STEP_OUTPUT:
        """Compute the loss of the stage from a batch of normal images; every term is logged by name."""
        if self.model.is_amplifying:
            images, mask, foreground = self.anomalies(batch.image, batch.image_path)
            terms = self.loss(self.model(images, mask), mask, foreground)
        else:
            is_fast = self.hparams["recipe"] == "fast"
            share = easy_share(self._progress_of(self.amplifier_end, 1.0)) if is_fast else 0.0
            terms = self.loss(self.model(batch.image), easy_share=share)
        size = batch.batch_size
        self.log("stage", 1.0 if self.model.is_amplifying else 2.0, on_step=False, on_epoch=True, batch_size=size)
        return self.log_terms(terms, size)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note where stage two starts."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["amplifier_epochs"] = self.amplifier_epochs

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load, and remember where stage two was to start."""
        super().on_load_checkpoint(checkpoint)
        self.resumed_amplifier_epochs = checkpoint.get("amplifier_epochs")
        is_resuming = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        was_amplifying = bool(checkpoint.get("state_dict", {}).get("model._extra_state", False))
        self.resumed_in_stage_two = is_resuming and not was_amplifying and checkpoint.get("global_step", 0) > 0
        if was_amplifying and not is_resuming:
            rank_zero_warn(f"This checkpoint was saved {IN_STAGE_ONE}. Resume its training, with the same max_epochs.")

    def warn_before_export(self) -> None:
        """Say that there is no student yet."""
        if self.model.is_amplifying:
            rank_zero_warn(f"This AAND is {IN_STAGE_ONE}.")

    def _is_stage_one(self) -> bool:
        """Whether the epoch that starts now trains the amplifier."""
        if self.amplifier_epochs is None and self.resumed_in_stage_two:  # with more time than it had at first
            return False
        return training_progress(self.trainer) < self.amplifier_end - ROUNDING

    def _progress_of(self, first: float, last: float) -> float:
        """Share of a stage, from ``first`` to ``last`` of the training, that is over."""
        return min(max((training_progress(self.trainer) - first) / max(last - first, ROUNDING), 0.0), 1.0)

    def _start_stage(self) -> None:
        """Freeze what this epoch doesn't train, and say so."""
        is_amplifying = self._is_stage_one()
        self.model.start_stage(is_amplifying)
        self.train()
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy):
            # DDP notes when it wraps which parameters get gradients, and waits for them.
            strategy.model = self
            strategy.configure_ddp()
        name, task = ("one", "amplifier") if is_amplifying else ("two", "student")
        at = f"the first epoch after {self.amplifier_end:.0%} of the time"
        if self.amplifier_epochs is not None:
            or_in_time = f" or {at}, whichever is sooner" if _is_timed(self.trainer) else ""
            at = f"epoch {self.amplifier_epochs}{or_in_time}"
        rank_zero_info(f"AAND, epoch {self.current_epoch}: stage {name} trains the {task}; stage two starts with {at}.")


def count_epochs(trainer: Trainer) -> int | None:
    """Epochs until ``max_epochs`` or ``max_steps``, whichever comes first; None where ``max_time`` alone ends them.

    Raises:
        ValueError: If none of them is given.
    """
    if trainer.max_steps == -1:
        if trainer.max_epochs != -1:
            return trainer.max_epochs
        if _is_timed(trainer):
            return None
        msg = "AAND divides its training between two stages, but this one has no end; set max_epochs or max_time."
        raise ValueError(msg)
    trainer.fit_loop.setup_data()
    steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    epochs = math.ceil(trainer.max_steps / max(steps, 1))
    limit = trainer.max_epochs
    return epochs if limit is None or limit == -1 else min(epochs, limit)


def _is_timed(trainer: Trainer) -> bool:
    """Whether ``max_time`` may end the training."""
    return any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def split_epochs(epochs: int, share: float) -> int:
    """Epochs of stage one: a share of all, at least one for each stage. A single epoch goes to stage two."""
    if epochs < 2:
        rank_zero_warn("One epoch holds no two stages: the amplifier stays untrained; give max_epochs=2 or more.")
        return 0
    return min(max(round(share * epochs), 1), epochs - 1)


def learning_rate_factor(progress: float, drops: Sequence[float] = (0.8, 0.9), factor: float = 0.2) -> float:
    """What the paper's learning rate is multiplied by when a share of its stage, either one, is over."""
    return factor ** sum(progress >= drop - ROUNDING for drop in drops)
