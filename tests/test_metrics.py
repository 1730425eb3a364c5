"""Metrics of raw scores."""

import pytest
import torch
from anomalib.data import ImageBatch
from sklearn.metrics import roc_auc_score

from anomalib_rdpp.metrics import AUROC


def batches(scores, labels, size):
    for some, truth in zip(scores.split(size), labels.split(size), strict=True):
        yield ImageBatch(image=torch.zeros(len(some), 3, 32, 32), pred_score=some, gt_label=truth)


@pytest.mark.parametrize("size", [1, 8, 40])
@pytest.mark.parametrize("scale", [0.1, 1.0, 50.0, 1e4])
def test_auroc_of_raw_scores_does_not_depend_on_the_batches(size, scale):
    labels = torch.arange(40) >= 20
    scores = scale * (0.8 + 0.3 * torch.rand(40) + 0.1 * labels)
    metric = AUROC(fields=["pred_score", "gt_label"], prefix="image_")
    for batch in batches(scores, labels, size):
        metric.update(batch)
    assert float(metric.compute()) == pytest.approx(roc_auc_score(labels, scores))
    assert metric.name == "image_AUROC"
