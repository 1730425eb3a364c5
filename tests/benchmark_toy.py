"""A user's own model, as small as one can be: what the benchmarks run in tests."""

import torch
from anomalib import LearningType
from anomalib.data import InferenceBatch
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from torch import nn
from torch.nn import functional
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

FILLED = []


class ToyNetwork(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, width, 3, 4, 1), nn.ReLU(), nn.Conv2d(width, width, 1))
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, images):
        distances = (self.layer(images) - self.mean[:, None, None]).square().mean(1, keepdim=True)
        if self.training:
            return distances
        anomaly_map = functional.interpolate(distances, scale_factor=4.0, mode="bilinear")
        return InferenceBatch(anomaly_map=anomaly_map, pred_score=anomaly_map.amax((1, 2, 3)))


class Toy(AnomalibModule):
    """Pull features to a fixed vector."""

    def __init__(
        self,
        backbone: str = "none",  # noqa: ARG002
        width: int = 4,
        pre_processor=True,
        post_processor=True,
        evaluator=True,
        visualizer=True,
    ):
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.model = ToyNetwork(width)

    def training_step(self, batch, *_, **__):
        return {"loss": self.model(batch.image).mean()}

    def validation_step(self, batch, *_, **__):
        return batch.update(**self.model(batch.image)._asdict())

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=0.01)

    @property
    def trainer_arguments(self):
        return {}

    @property
    def learning_type(self):
        return LearningType.ONE_CLASS


class CroppingToy(Toy):
    """Sees 32 of 48 pixels, whatever is wanted."""

    @staticmethod
    def configure_pre_processor(image_size=None):
        if image_size is not None:
            raise ValueError(image_size)
        normal = Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
        return PreProcessor(Compose([Resize((48, 48), antialias=True), CenterCrop(32), normal]))


def fill(model, entry, size):
    FILLED.append((type(model).__name__, entry["bank"], size))
