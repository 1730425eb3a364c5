"""The smallest model that has everything, and how to run it: what the tests build instead of the papers' networks."""

from pathlib import Path

from anomalib.callbacks import ModelCheckpoint
from anomalib.engine import Engine
from anomalib.models import AnomalibModule, get_model
from lightning.pytorch import Callback

MODELS = ["RDPP", "AAND"]
TINY = {"backbone": "test_resnet", "pre_trained": False}  # 0.4 million weights; its student is the light one
FOLDERS = {  # of the tiny images in conftest.py
    "normal_dir": "train/good",
    "normal_test_dir": "test/good",
    "abnormal_dir": "test/square",
    "mask_dir": "ground_truth/square",
}


def build(name: str, size: int | tuple[int, int] = 64, **arguments: object) -> AnomalibModule:
    """Build a tiny model for images of a size; without pictures, unless asked for."""
    model_class = type(get_model(name, **TINY))
    height_and_width = (size, size) if isinstance(size, int) else size
    pre_processor = model_class.configure_pre_processor(height_and_width)
    return model_class(**{**TINY, "pre_processor": pre_processor, "visualizer": False, **arguments})


def engine(folder: Path, *callbacks: Callback, **arguments: object) -> Engine:
    """Engine on the CPU for two epochs; saves no checkpoints, unless a callback does."""
    if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        callbacks = (*callbacks, ModelCheckpoint(folder, save_top_k=0))
    arguments = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False, **arguments}
    arguments = {"enable_progress_bar": False, "enable_model_summary": False, **arguments}
    return Engine(default_root_dir=folder, callbacks=list(callbacks), **arguments)
