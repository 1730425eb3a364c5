"""A threshold from normal images alone; anomalib's default needs defects to set one."""

from typing import Any

import torch
from anomalib.data import Batch
from anomalib.post_processing import PostProcessor
from lightning import LightningModule, Trainer
from torchmetrics.aggregation import CatMetric

from anomalib_rdpp.teacher import check

QUANTILE = "normal_quantile"  # in checkpoints


class NormalThreshold(PostProcessor):
    """Call anomalous what scores higher than nearly all normal images of the validation set.

    Defects in the validation set don't count, and none are needed: ``--data.val_split_mode from_train`` validates on
    a part of the training images. An image has its threshold by its score, a pixel by the maxima of the maps: the same
    where the score is that maximum. Normalised scores are 0.5 at the threshold and 1 from twice the threshold on.
    Checkpoints bring it back, exports are read as those of anomalib's post-processor.

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
        check(0 < quantile <= 1, "quantile", "above 0 and at most 1", quantile)
        self.quantile = quantile
        self.normal_scores, self.normal_maxima = CatMetric(), CatMetric()

    def checkpoint_config(self) -> dict[str, Any]:
        """Give what a checkpoint is to keep: the quantile too, by which it is known again."""
        return {**super().checkpoint_config(), QUANTILE: self.quantile}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Take what a checkpoint has kept."""
        super().load_checkpoint_config(config)
        self.quantile = config.get(QUANTILE, self.quantile)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Batch, *args: object, **kwargs: object
    ) -> None:
        """Collect the scores of normal images."""
        del trainer, pl_module, args, kwargs
        if outputs.gt_label is not None:
            normal = ~outputs.gt_label.bool()
            self.normal_scores.update(outputs.pred_score[normal])
            self.normal_maxima.update(outputs.anomaly_map[normal].flatten(1).amax(dim=1))

    def on_validation_epoch_end(self, trainer: Trainer, *_: object) -> None:
        """Set thresholds and ranges."""
        image = (self.normal_scores, self._image_threshold, self.image_min, self.image_max)
        pixel = (self.normal_maxima, self._pixel_threshold, self.pixel_min, self.pixel_max)
        for metric, threshold, least, most in (image, pixel):
            values = torch.as_tensor(metric.compute()).flatten()
            metric.reset()
            if trainer.sanity_checking:  # on the first two batches, which may be defects
                continue
            if not len(values):
                msg = "The validation set has no normal image to set a threshold by; take val_split_mode from_train."
                raise ValueError(msg)
            threshold.copy_(values.quantile(self.quantile))
            least.fill_(0)
            most.copy_(2 * threshold)
