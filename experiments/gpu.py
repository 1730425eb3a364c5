"""Steps per second, images per second and memory of training on a GPU, by Lightning's trainer as users run it.

python -m experiments.gpu --output results/gpu.csv

Times are of windows of ten steps, after ten that aren't counted; the images are on the GPU already.
"""

import time
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from anomalib_rdpp import AAND, RDPP
from anomalib_rdpp.benchmark.cli import run
from anomalib_rdpp.benchmark.grid import refuse_unknown
from anomalib_rdpp.benchmark.results import Results, commit, markdown

WINDOW = 10  # steps
MODELS = {
    "RD++": RDPP,
    "RD": partial(RDPP, projection=False),
    "RD++, compiled student": RDPP,
    "AAND, stage one": AAND,
    "AAND, stage two": AAND,
}
KEY = ("model", "backbone", "precision", "image_size", "batch_size", "device", "torch", "commit")
NUMBERS = ("median_ms", "min_ms", "max_ms", "images_per_second", "peak_mib", "first_seconds")
SHOWN = ("model", "backbone", "precision", *NUMBERS)
gpu_results = partial(Results, "experiments.gpu", (*KEY, *NUMBERS, "error"), KEY, NUMBERS)


class Windows(Callback):
    """Time windows of steps; the GPU is waited for between them alone."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Note the time."""
        if trainer.global_step % WINDOW == 0:
            trainer.should_stop = trainer.is_last_batch
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())


def run_gpu(
    output: Path = Path("results/gpu.csv"),
    backbones: Sequence[str] = ("resnet18",),
    precisions: Sequence[str] = ("32-true", "16-mixed", "bf16-mixed"),
    models: Sequence[str] = tuple(MODELS),
    size: int = 256,
    batch: int = 16,
    windows: int = 8,
) -> str:
    """Time training steps of each model in each precision.

    Args:
        output: CSV file, appended to.
        backbones: Teachers, with random weights.
        precisions: As Lightning names them.
        models: Of those in `MODELS`.
        size: Side of the images in pixels.
        batch: Images per step.
        windows: Of ten steps each.

    Returns:
        A Markdown table of the CSV.

    Raises:
        ValueError: If a model is unknown.
    """
    refuse_unknown(models, MODELS)
    results = gpu_results(output)
    for backbone, precision, model in product(backbones, precisions, models):
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        row = {"model": model, "backbone": backbone, "precision": precision, "image_size": size, "batch_size": batch}
        row |= {"device": device, "torch": torch.__version__, "commit": commit()}
        if results.done(row):
            continue
        with results.run(row):
            row |= _time(model, backbone, precision, size, batch, windows)
            results.append(row)
    return markdown([{name: row[name] for name in SHOWN} for row in results.rows() if not row["error"]])


def _time(model: str, backbone: str, precision: str, size: int, batch: int, windows: int) -> dict[str, Any]:
    """Train on one batch of noise, over and over."""
    torch.manual_seed(0)
    module = MODELS[model](backbone=backbone, pre_trained=False, evaluator=False, visualizer=False)
    if "compiled" in model:
        module.model.student.compile()
    image, clock = torch.rand(batch, 3, size, size), Windows()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        image = image.cuda()
    batches = [ImageBatch(image=image)] * (WINDOW * (windows + 1))
    epochs = 2 if "one" in model else 1  # the first of two is stage one, an only one is stage two
    with TemporaryDirectory() as folder:
        Trainer(
            max_epochs=epochs, devices=1, precision=precision, logger=False, callbacks=[clock],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        ).fit(module, DataLoader(batches, batch_size=None))  # fmt: skip
    first, *times = 1000 * np.diff(clock.times) / WINDOW
    found = {"median_ms": np.median(times), "min_ms": min(times), "max_ms": max(times)}
    found |= {"images_per_second": 1000 * batch / np.median(times), "first_seconds": first * WINDOW / 1000}
    found["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else np.nan
    return {name: round(float(value), 1) for name, value in found.items()}


if __name__ == "__main__":
    run("python -m experiments.gpu", run_gpu)
