"""A threshold from normal images alone; the host's default needs defects to set one."""

import torch
from anomalib.data import Batch
from anomalib.post_processing import PostProcessor
from lightning import LightningModule, Trainer
from torchmetrics.aggregation import CatMetric


class NormalThreshold(PostProcessor):
    """Call anomalous what scores higher than nearly all normal images of the validation set.

    Defects in the validation set don't count, and none are needed: ``--data.val_split_mode from_train`` validates on
    a part of the training images. The score is the map's maximum, so the threshold of images is that of pixels too.
    Normalised scores are 0.5 at the threshold and 1 from twice the threshold on.
    Checkpoints and exports are read as those of the host's post-processor.

    Args:
        quantile: Share of the normal validation images that are to stay below the threshold. With fewer than a hundred
            images, 0.99 is close to the greatest of their scores.

    Raises:
        ValueError: If the quantile is not above 0 and at most 1, or the validation set has no normal image.

    Examples:
        >>> from anomalib_rdpp import RDPP
        >>> model = RDPP("resnet18", pre_trained=False, post_processor=NormalThreshold(0.95))
    """

    def __init__(self, quantile: float = 0.99) -> None:
        super().__init__()
        if not 0 < quantile <= 1:
            msg = f"quantile must be above 0 and at most 1, got {quantile}."
            raise ValueError(msg)
        self.quantile = quantile
        self.normal_scores = CatMetric()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Batch,
        *args: object,
        **kwargs: object,
    ) -> None:
        """Collect the scores of normal images."""
        del trainer, pl_module, args, kwargs
        if outputs.gt_label is not None:
            self.normal_scores.update(outputs.pred_score[~outputs.gt_label.bool()])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set threshold and range."""
        del pl_module
        scores = torch.as_tensor(self.normal_scores.compute()).flatten()
        self.normal_scores.reset()
        if trainer.sanity_checking:  # on the first two batches, which may be defects
            return
        if not len(scores):
            msg = "The validation set has no normal image to set a threshold by; take val_split_mode from_train."
            raise ValueError(msg)
        for threshold in (self._image_threshold, self._pixel_threshold):
            threshold.copy_(scores.quantile(self.quantile))
        for least, most in ((self.image_min, self.image_max), (self.pixel_min, self.pixel_max)):
            least.fill_(0)
            most.copy_(2 * self._image_threshold)
