"""RD++ as an anomalib model: arguments, optimiser, steps.

Source: Tien et al., Revisiting Reverse Distillation for Anomaly Detection, CVPR 2023.
"""

from collections.abc import Sequence

from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch.optim.lr_scheduler import LambdaLR

from anomalib_rdpp.base import DistillationMixin, short_errors
from anomalib_rdpp.recipe import build_optimizer, cosine_factor, easy_share, training_progress
from anomalib_rdpp.student import SCALES
from anomalib_rdpp.synthesis.noise import SimplexNoise
from anomalib_rdpp.teacher import check_choice

from .loss import RDPPLoss
from .torch_model import RDPPModel

LEARNING_RATES = {"paper": (0.001, 0.005), "fast": (0.0005, 0.002)}  # of projection and student, by recipe


class RDPP(DistillationMixin, AnomalibModule):
    """RD++: reverse distillation whose student sees projected features, cleaned of pseudo-anomalies.

    The defaults are the paper's but for ``score`` and ``transport_weight``, at 256 x 256 pixels and batch size 16.

    Args:
        backbone: Teacher network by its timm name, with or without weights tag: any CNN with features at strides 4, 8
            and 16. The papers' weights are those tagged tv_in1k; timm's untagged default is another set.
        pre_trained: Whether the teacher takes ImageNet weights, from timm's cache or by download.
        teacher_weights: File with the teacher's state dict (.pt, .pth, .safetensors), instead of a download.
        student: "paper" for the papers' student, which mirrors resnet18, resnet34, resnet50 or wide_resnet50_2; "light"
            for one with fewer multiply-adds for any teacher; "cascade" for the same, whose coarsest scale alone decides
            what passes the bottleneck; "auto" for the papers' where there is one.
        width: Channels inside the light student, relative to the teacher's: one number, or one of each scale.
        projection: True for the paper's, "light" for one with fewer multiply-adds. False for plain RD (CVPR 2022): the
            student sees the teacher's features as they are, and the distillation loss trains it alone.
        recipe: "paper" for the paper's optimiser and constant rates; "fast" for AdamW, a schedule that ends where
            training ends (epochs, steps or time), and little gradient for what is already learnt.
        projection_lr: Learning rate of the projection; of the recipe by default, 0.001 or 0.0005.
        student_lr: Learning rate of bottleneck and decoder; of the recipe by default, 0.005 or 0.002.
        projection_weight: Weight of the projection loss beside the distillation loss.
        transport_weight: Weight of the optimal transport term within the projection loss: 0, the default, for none,
            which is what the official code's call comes to; 1 for the paper's term.
        reconstruction_weight: Weight of the reconstruction term within the projection loss.
        contrast_weight: Weight of the contrast term within the projection loss.
        transport_positions: Random positions per scale that the transport term compares. Its cost grows with the
            square.
        noise_strength: Factor on the simplex noise of the pseudo-anomalies, in units of the pixel range [0, 1].
        noise_patch_min: Shortest side of the noisy rectangle, in pixels.
        noise_patch_max: Longest side of the noisy rectangle, in pixels.
        score: An image's score: "top" for the mean of its map's highest pixels, which was ahead on two data sets; "max"
            for the map's maximum, as in the papers; "sum" for the sum of all; "coarse" as "top", of the coarsest
            scale's map alone; "standardised" adds the same of this scale's features standardised, which the student
            learns too.
        score_fraction: Share of the map's pixels that score="top", "coarse" and "standardised" average.
        bottleneck: "mff+oce" for the paper's; "oce" without the fusion of scales, "none" without its residual stage
            too, for ablations.
        scales: Which of the scales 1 to 3, fine to coarse, the student gives back and the map compares, for ablations.
        pre_processor: Pre-processor, True for a resize to 256 x 256, or False. It must not normalise.
        post_processor: Post-processor, True for anomalib's, or False.
        evaluator: Evaluator, True for anomalib's metrics, or False.
        visualizer: Visualizer, True for anomalib's, or False.
        layers: Of configs and checkpoints of before; has no effect.
        transport: Of configs and checkpoints of before: "published" is transport_weight=0.

    Raises:
        ValueError: If an argument is not admissible.
        FileNotFoundError: If the file of teacher weights doesn't exist, or ImageNet weights are nowhere to be had.

    Examples:
        >>> model = RDPP(backbone="resnet18", pre_trained=False)
        >>> model.name
        'RDPP'
    """

    structure = frozenset({"backbone", "student", "width", "projection", "bottleneck", "scales"})
    model: RDPPModel
    loss: RDPPLoss

    def __init__(
        self,
        backbone: str = "wide_resnet50_2.tv_in1k",
        pre_trained: bool = True,
        teacher_weights: str | None = None,
        student: str = "auto",
        width: float | Sequence[float] = 1.0,
        projection: bool | str = True,
        recipe: str = "paper",
        projection_lr: float | None = None,
        student_lr: float | None = None,
        projection_weight: float = 0.2,
        transport_weight: float | None = None,
        reconstruction_weight: float = 0.01,
        contrast_weight: float = 0.1,
        transport_positions: int = 64,
        noise_strength: float = 0.2,
        noise_patch_min: int = 10,
        noise_patch_max: int = 31,
        score: str = "top",
        score_fraction: float = 0.01,
        bottleneck: str = "mff+oce",
        scales: Sequence[int] = SCALES,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        layers: Sequence[str] | None = None,
        transport: str | None = None,
    ) -> None:
        with short_errors():
            super().__init__(pre_processor, post_processor, evaluator, visualizer)
            check_choice("recipe", recipe, LEARNING_RATES)
            self.noise = SimplexNoise(noise_strength, noise_patch_min, noise_patch_max)
            if transport is not None:  # of configs and checkpoints of before
                check_choice("transport", transport, ("published", "paper"))
                given = 1.0 if transport_weight is None else transport_weight
                transport_weight = given if transport == "paper" else 0.0
                rank_zero_warn(f"transport: {transport} has become transport_weight: {transport_weight:g}.")
            self.hparams["transport_weight"] = transport_weight = transport_weight or 0.0
            self.loss = RDPPLoss(
                projection_weight, transport_weight, reconstruction_weight, contrast_weight, transport_positions
            )
            teacher = (backbone, pre_trained, teacher_weights)
            self.model = RDPPModel(*teacher, student, width, projection, score, score_fraction, bottleneck, scales)
            rates = zip((projection_lr, student_lr), LEARNING_RATES[recipe], strict=True)
            self.learning_rates = [default if rate is None else rate for rate, default in rates]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Give projection and student their learning rates; the official code's two Adams are one with two groups."""
        optimizer = build_optimizer(self, (self.model.projections, self.model.student), self.learning_rates)
        if self.hparams["recipe"] == "paper":
            return optimizer
        schedule = LambdaLR(optimizer, lambda _: cosine_factor(training_progress(self.trainer)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: ImageBatch, *_: object, **__: object) -> STEP_OUTPUT:
        """Compute the loss of a batch of normal images; every term is logged by name."""
        noisy = self.noise(batch.image) if self.model.is_projecting else None
        is_fast = self.hparams["recipe"] == "fast"
        share = easy_share(training_progress(self.trainer)) if is_fast else 0.0
        return self.log_terms(self.loss(self.model(batch.image, noisy), share), batch.batch_size)
