"""AUROC of raw scores and maps, those that no post-processor has brought into [0, 1]."""

from types import SimpleNamespace

from anomalib import metrics
from anomalib.data import Batch


class AUROC(metrics.AUROC):
    """anomalib's AUROC for values of any range.

    Torchmetrics takes a batch with values outside of [0, 1] for logits and puts it through a sigmoid, and leaves the
    other batches as they are: scores of different batches are then on different scales, and the result is wrong. Here
    every value goes through one increasing function into [0, 1] first, which leaves the AUROC what it is.

    Examples:
        >>> import torch
        >>> from anomalib.data import ImageBatch
        >>> metric = AUROC(fields=["pred_score", "gt_label"])
        >>> for score, label in ((0.9, False), (1.1, True)):  # a batch each
        ...     image = torch.zeros(1, 3, 32, 32)
        ...     metric.update(ImageBatch(image=image, pred_score=torch.tensor([score]), gt_label=torch.tensor([label])))
        >>> float(metric.compute())
        1.0
    """

    def update(self, batch: Batch) -> None:
        """Take in a batch."""
        values = {name: getattr(batch, name, None) for name in self.fields}
        for name, value in values.items():
            if value is not None and value.is_floating_point():
                exact = value if value.device.type == "mps" else value.double()  # or large scores become ties
                values[name] = 0.5 * (1 + exact / (1 + exact.abs()))
        super().update(SimpleNamespace(**values))
