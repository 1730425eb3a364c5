"""Accuracy of models on equal terms: models x data x seeds, one CSV row each, written as soon as it is known.

Protocol: a fixed number of epochs, the last one is tested once; no validation, no early stopping, nothing is chosen on
test data. A row that is in the CSV is not run again; a run that fails becomes a row with its error, and the next call
tries it again. ``best_on_test`` does what the published programs do, and its rows say so.
"""

import gc
import logging
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_only

from .grid import (
    build_datamodule,
    build_model,
    epochs_of,
    read_grid,
    row_names,
    run_folder,
    sets_to_test,
    trainer_options,
)
from .probe import peak_mib, reset_peak
from .rows import append_row, commit, read_rows

logger = logging.getLogger(__name__)

KEY = ("data", "model", "seed", "epochs", "image_size", "batch_size", "protocol")
METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO", "image_F1Max")
PROTOCOLS = ("last", "best on test")
COLUMNS = (
    "data", "model", "seed", "epochs", "steps", "train_images", "test_images", "image_size", "batch_size",
    *METRICS,
    "fit_seconds", "test_seconds", "peak_memory_mib", "parameters", "anomalib", "torch", "commit", "device",
    "protocol", "teacher", "gpu_memory_mib", "error",
)  # fmt: skip


def run_accuracy(config: Path, output: Path, shard: tuple[int, int] = (1, 1), best_on_test: bool = False) -> None:
    """Run the rows of a grid that ``output`` doesn't hold yet.

    Args:
        config: YAML, see ``grid``.
        output: CSV file, appended to; its folder also takes the checkpoints.
        shard: ``(i, n)`` runs every n-th run from the i-th, so that machines can share a grid.
        best_on_test: Test after every epoch and report that of the highest image AUROC **on the test images**, as the
            published programs do. Such rows are labelled; by default the last epoch is reported.

    Raises:
        ValueError: If the shard is not within 1..n.
    """
    index, count = shard
    if not 1 <= index <= count:
        msg = f"A shard is i/n with 1 <= i <= n, got {index}/{count}."
        raise ValueError(msg)
    grid = read_grid(config)
    runs = list(runs_of(grid))[index - 1 :: count]
    done = {tuple(row[key] for key in KEY) for row in read_results(output) if not row["error"]}
    for number, (data, model, seed) in enumerate(runs, 1):
        facts = {"model": model, "seed": seed, "epochs": epochs_of(grid, data, model), **_facts(grid, best_on_test)}
        rows = {name: {"data": name, **facts} for name in row_names(grid, data)}
        if all(tuple(str(row[key]) for key in KEY) in done for row in rows.values()):
            continue
        logger.warning("run %d of %d: %s on %s, seed %d", number, len(runs), model, data, seed)
        try:
            for name, results in _train_and_test(grid, data, model, seed, output.parent, best_on_test).items():
                rows[name] |= results
        except Exception as error:
            logger.exception("run %d failed", number)
            rows = {name: {**row, "error": f"{type(error).__name__}: {error}"} for name, row in rows.items()}
        for row in rows.values():
            rank_zero_only(append_row)(output, COLUMNS, row)


def read_results(path: Path) -> list[dict[str, str]]:
    """Read the rows of such a CSV; older ones don't name their protocol, which was the last epoch."""
    return [{**row, "protocol": row["protocol"] or PROTOCOLS[0]} for row in read_rows(path, COLUMNS)]


def runs_of(grid: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Seeds outermost, so that a grid that is cut short compares all models."""
    for seed in grid["seeds"]:
        for data in grid["data"]:
            for model in grid["models"]:
                yield data, model, seed


def _train_and_test(
    grid: dict[str, Any],
    data: str,
    model: str,
    seed: int,
    folder: Path,
    best_on_test: bool,
) -> dict[str, dict[str, Any]]:
    """Train one model for its epochs, test it once, on joined categories once each; a row's figures by its data."""
    seed_everything(seed, workers=True)
    _reset_peaks()
    datamodule = build_datamodule(grid, data)
    module = build_model(grid, model, has_masks=datamodule.task == "segmentation")
    every_epoch = _EveryEpoch()
    options = {"limit_val_batches": 0, **trainer_options(grid, model)}
    if best_on_test:
        if len(row_names(grid, data)) > 1:
            msg = "Joined categories have no single best epoch on test images: leave --best-on-test away."
            raise ValueError(msg)
        datamodule.val_data = datamodule.test_data
        options |= {"limit_val_batches": 1.0, "check_val_every_n_epoch": 1, "callbacks": [every_epoch]}
    engine = Engine(
        max_epochs=epochs_of(grid, data, model),
        default_root_dir=run_folder(grid, data, model, seed, folder),
        num_sanity_val_steps=0,
        logger=False,
        **options,
    )
    start = time.perf_counter()
    engine.fit(module, datamodule=datamodule)
    facts = {
        "steps": engine.trainer.global_step,
        "train_images": len(datamodule.train_data),
        "fit_seconds": round(time.perf_counter() - start),
        "parameters": sum(p.numel() for p in module.parameters()),
        "device": f"{engine.trainer.strategy.root_device} {platform.machine()}",
    }
    tested = {data: every_epoch.best()} if best_on_test else _test(engine, module, datamodule, grid, data)
    facts["peak_memory_mib"] = peak_mib()
    if (device := engine.trainer.strategy.root_device).type == "cuda":
        facts["gpu_memory_mib"] = torch.cuda.max_memory_allocated(device) // 2**20
    return {name: {**facts, **results} for name, results in tested.items()}


def _reset_peaks() -> None:
    """Free what earlier runs left and count the peaks of memory from now on."""
    gc.collect()  # a trainer and its model hold each other
    reset_peak()
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def _test(
    engine: Engine,
    module: AnomalibModule,
    datamodule: AnomalibDataModule,
    grid: dict[str, Any],
    data: str,
) -> dict[str, dict[str, Any]]:
    """Test each set that is tested apart."""
    tested = {}
    for name, images in sets_to_test(grid, data, datamodule).items():
        datamodule.test_data = images
        start = time.perf_counter()
        metrics = engine.test(module, datamodule=datamodule, verbose=False)[0]
        tested[name] = {"test_images": len(images), "test_seconds": round(time.perf_counter() - start)}
        tested[name] |= _in_row(metrics)
    return tested


class _EveryEpoch(Callback):
    """Keep the metrics of each epoch's validation, which is on the test images here."""

    def __init__(self) -> None:
        self.results: list[dict[str, Any]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: AnomalibModule) -> None:
        """Take what the evaluator has logged."""
        del pl_module
        images = {"test_images": len(trainer.datamodule.val_data)}
        self.results.append({**images, **_in_row(trainer.callback_metrics)})

    def best(self) -> dict[str, Any]:
        """Give the metrics of the epoch with the highest image AUROC."""
        return max(self.results, key=lambda results: results["image_AUROC"])


def _in_row(metrics: dict[str, Any]) -> dict[str, float]:
    """Round the metrics that rows have."""
    return {name: round(float(metrics[name]), 4) for name in METRICS if name in metrics}


def _facts(grid: dict[str, Any], best_on_test: bool) -> dict[str, Any]:
    """What makes a row reproducible."""
    return {
        "image_size": grid["image_size"],
        "batch_size": grid["batch_size"],
        "anomalib": version("anomalib"),
        "torch": version("torch"),
        "commit": commit(),
        "protocol": PROTOCOLS[best_on_test],
        "teacher": grid.get("teacher", ""),
    }
