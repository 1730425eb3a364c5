"""RD++ as an anomalib model: arguments, optimiser, steps.

Source: Tien et al., Revisiting Reverse Distillation for Anomaly Detection, CVPR 2023.
"""

from collections.abc import Sequence

from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.optim import Adam

from anomalib_rdpp.base import DistillationMixin
from anomalib_rdpp.synthesis.noise import SimplexNoise

from .loss import RDPPLoss
from .torch_model import RDPPModel


class RDPP(DistillationMixin, AnomalibModule):
    """RD++: reverse distillation whose student sees projected features, cleaned of pseudo-anomalies.

    The defaults are the paper's, at 256 x 256 pixels and batch size 16.

    Args:
        backbone: Teacher network by its timm name: resnet18, resnet34, resnet50 or wide_resnet50_2, with or without
            weights tag. The papers' weights are those tagged tv_in1k; timm's untagged default is another set.
        layers: The teacher's three layers that are compared, fine to coarse.
        pre_trained: Whether the teacher takes ImageNet weights, from timm's cache or by download.
        teacher_weights: File with the teacher's state dict (.pt, .pth, .safetensors), instead of a download.
        projection_lr: Learning rate of the projection.
        student_lr: Learning rate of bottleneck and decoder.
        projection_weight: Weight of the projection loss beside the distillation loss.
        transport_weight: Weight of the optimal transport term within the projection loss.
        reconstruction_weight: Weight of the reconstruction term within the projection loss.
        contrast_weight: Weight of the contrast term within the projection loss.
        transport: Optimal transport term: "paper" compares the features of pairs of images, as the paper means;
            "published" leaves it out, which is what the published program comes to.
        transport_positions: Random positions per scale that the transport term compares. Its cost grows with the
            square.
        noise_strength: Factor on the simplex noise of the pseudo-anomalies, in units of the pixel range [0, 1].
        noise_patch_min: Shortest side of the noisy rectangle, in pixels.
        noise_patch_max: Longest side of the noisy rectangle, in pixels.
        projection: False for plain RD (CVPR 2022): the student sees the teacher's features as they are, and the
            distillation loss trains it alone.
        pre_processor: Pre-processor, True for a resize to 256 x 256, or False. It must not normalise.
        post_processor: Post-processor, True for anomalib's, or False.
        evaluator: Evaluator, True for anomalib's metrics, or False.
        visualizer: Visualizer, True for anomalib's, or False.

    Raises:
        ValueError: If backbone, layers, weights or noise sides are not admissible.
        FileNotFoundError: If the file of teacher weights doesn't exist.

    Examples:
        >>> model = RDPP(backbone="resnet18", pre_trained=False)
        >>> model.name
        'RDPP'
    """

    def __init__(
        self,
        backbone: str = "wide_resnet50_2.tv_in1k",
        layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        pre_trained: bool = True,
        teacher_weights: str | None = None,
        projection_lr: float = 0.001,
        student_lr: float = 0.005,
        projection_weight: float = 0.2,
        transport_weight: float = 1.0,
        reconstruction_weight: float = 0.01,
        contrast_weight: float = 0.1,
        transport: str = "paper",
        transport_positions: int = 64,
        noise_strength: float = 0.2,
        noise_patch_min: int = 10,
        noise_patch_max: int = 31,
        projection: bool = True,
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
        self.model = RDPPModel(
            backbone,
            layers,
            pre_trained,
            teacher_weights,
            SimplexNoise(noise_strength, noise_patch_min, noise_patch_max),
            projection,
        )
        self.loss = RDPPLoss(
            projection_weight,
            transport_weight,
            reconstruction_weight,
            contrast_weight,
            transport,
            transport_positions,
        )

    def configure_optimizers(self) -> Adam:
        """Give projection and student their learning rates; the two Adams of the program are one with two groups."""
        groups = [
            {"params": list(self.model.projections.parameters()), "lr": self.hparams.projection_lr},
            {"params": list(self.model.student.parameters()), "lr": self.hparams.student_lr},
        ]
        return self.build_optimizer([group for group in groups if group["params"]])

    def training_step(self, batch: Batch, *args: object, **kwargs: object) -> STEP_OUTPUT:
        """Compute the loss of a batch of normal images; every term is logged by name."""
        del args, kwargs
        terms = self.loss(self.model(batch.image))
        for name, term in terms.items():
            self.log(
                f"train_{name}",
                term.detach(),
                on_step=False,
                on_epoch=True,
                prog_bar=name == "loss",
                batch_size=len(batch.image),
            )
        return terms["loss"]
