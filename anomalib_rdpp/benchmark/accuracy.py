"""Accuracy of models on equal terms: models x data x seeds, one CSV row each, written as soon as it is known.

Protocol: a fixed number of epochs, the last one is tested once; no validation, no early stopping, nothing is chosen on
test data. A row that is in the CSV is not run again; a run that fails becomes a row with its error, and the next call
tries it again.
"""

import logging
import platform
import resource
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from anomalib.data import AnomalibDataModule, get_datamodule
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, Evaluator, F1Max
from anomalib.models import AnomalibModule
from anomalib.utils.serialization import anomalib_safe_globals
from lightning import seed_everything
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_rdpp.metrics import AUROC

from .rows import append_row, commit, read_rows

logger = logging.getLogger(__name__)

KEY = ("data", "model", "seed", "epochs", "image_size", "batch_size")
METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO", "image_F1Max")
COLUMNS = (
    "data", "model", "seed", "epochs", "steps", "train_images", "test_images", "image_size", "batch_size",
    *METRICS,
    "fit_seconds", "test_seconds", "peak_memory_mib", "parameters", "anomalib", "torch", "commit", "device", "error",
)  # fmt: skip


def run_accuracy(config: Path, output: Path, shard: tuple[int, int] = (1, 1)) -> None:
    """Run the rows of a grid that ``output`` doesn't hold yet.

    Args:
        config: YAML with ``models`` and ``data`` (each a mapping from a name to ``class_path`` and ``init_args``; data
            also ``epochs`` and, to take a part, ``train_every`` and ``test_every``), ``seeds``, ``image_size`` and
            ``batch_size``.
        output: CSV file, appended to; its folder also takes the checkpoints.
        shard: ``(i, n)`` runs every n-th row from the i-th, so that machines can share a grid.

    Raises:
        ValueError: If the shard is not within 1..n.
    """
    index, count = shard
    if not 1 <= index <= count:
        msg = f"A shard is i/n with 1 <= i <= n, got {index}/{count}."
        raise ValueError(msg)
    grid = yaml.safe_load(config.read_text())
    rows = list(_rows(grid))[index - 1 :: count]
    done = {tuple(row[key] for key in KEY) for row in read_rows(output, COLUMNS) if not row["error"]}
    for number, (data, model, seed) in enumerate(rows, 1):
        epochs = _epochs(grid, data, model)
        if tuple(map(str, (data, model, seed, epochs, grid["image_size"], grid["batch_size"]))) in done:
            continue
        logger.warning("row %d of %d: %s on %s, seed %d", number, len(rows), model, data, seed)
        row = {"data": data, "model": model, "seed": seed, "epochs": epochs, **_facts(grid)}
        try:
            row |= _train_and_test(grid, data, model, seed, output.parent)
        except Exception as error:
            logger.exception("row %d failed", number)
            row["error"] = f"{type(error).__name__}: {error}".replace("\n", " ")
        append_row(output, COLUMNS, row)


def _rows(grid: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Seeds outermost, so that a grid that is cut short compares all models."""
    for seed in grid["seeds"]:
        for data in grid["data"]:
            for model in grid["models"]:
                yield data, model, seed


def _train_and_test(grid: dict[str, Any], data: str, model: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train one model for its epochs, test it once."""
    seed_everything(seed, workers=True)
    datamodule = build_datamodule(grid, data)
    module = build_model(grid, model)
    engine = Engine(
        max_epochs=_epochs(grid, data, model),
        default_root_dir=run_folder(grid, data, model, seed, folder),
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
    )
    start = time.perf_counter()
    engine.fit(module, datamodule=datamodule)
    fitted = time.perf_counter()
    metrics = engine.test(module, datamodule=datamodule, verbose=False)[0]
    return {
        "epochs": engine.trainer.current_epoch,
        "steps": engine.trainer.global_step,
        "train_images": len(datamodule.train_data),
        "test_images": len(datamodule.test_data),
        **{name: round(float(metrics[name]), 4) for name in METRICS if name in metrics},
        "fit_seconds": round(fitted - start),
        "test_seconds": round(time.perf_counter() - fitted),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,  # of the process so far
        "parameters": sum(p.numel() for p in module.parameters()),
        "device": f"{engine.trainer.strategy.root_device} {platform.machine()}",
    }


def run_folder(grid: dict[str, Any], data: str, model: str, seed: int, results: Path) -> Path:
    """Name the folder of a run's checkpoint; grids that differ in size or epochs may share ``results``."""
    return results / data / model / f"{grid['image_size']}px_{_epochs(grid, data, model)}epochs_seed{seed}"


def _epochs(grid: dict[str, Any], data: str, model: str) -> int:
    """Epochs of the model where it names its own, else of the data."""
    return grid["models"][model].get("epochs", grid["data"][data]["epochs"])


def build_datamodule(grid: dict[str, Any], name: str) -> AnomalibDataModule:
    """Build a datamodule, with a part of its images where the grid says so."""
    part = grid["data"][name]
    init_args = {
        "train_batch_size": grid["batch_size"],
        "eval_batch_size": grid["batch_size"],
        "num_workers": 0,
        "val_split_mode": "same_as_test",
        **part.get("init_args", {}),
    }
    datamodule = get_datamodule({"class_path": part["class_path"], "init_args": init_args})
    datamodule.setup(TrainerFn.FITTING)  # as the trainer does: else it would set up again, and forget the part
    for split, step in (("train", part.get("train_every", 1)), ("test", part.get("test_every", 1))):
        dataset = getattr(datamodule, f"{split}_data")
        in_name_order = dataset.samples["image_path"].sort_values().index
        setattr(datamodule, f"{split}_data", dataset.subsample(list(in_name_order[::step])))
    return datamodule


def build_model(grid: dict[str, Any], name: str) -> AnomalibModule:
    """Build a model with the same metrics and input size for all."""
    module, _, class_name = grid["models"][name]["class_path"].rpartition(".")
    model_class = getattr(import_module(module or "anomalib.models"), class_name)
    size = grid["image_size"]
    return model_class(
        **grid["models"][name].get("init_args", {}),
        pre_processor=model_class.configure_pre_processor((size, size)),
        post_processor=False,
        evaluator=Evaluator(
            test_metrics=[
                AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
                AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
                AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
                F1Max(fields=["pred_score", "gt_label"], prefix="image_"),
            ],
        ),
        visualizer=False,
    )


def load_trained(grid: dict[str, Any], data: str, name: str, seed: int, results: Path) -> AnomalibModule:
    """Build a model of a grid and load the newest checkpoint of its run's last epoch.

    Raises:
        FileNotFoundError: If there is none, because the run was not made or not finished.
    """
    folder = run_folder(grid, data, name, seed, results)
    model = build_model(grid, name)
    for path in sorted(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True):
        with anomalib_safe_globals(extra=model.checkpoint_safe_globals()):
            stored = torch.load(path, "cpu", weights_only=True)
        if stored["epoch"] + 1 == _epochs(grid, data, name):
            model.load_state_dict(stored["state_dict"], strict=False)
            return model.eval()
    msg = f"No trained model in '{folder}': run `python -m anomalib_rdpp.benchmark accuracy` with this grid first."
    raise FileNotFoundError(msg)


def _facts(grid: dict[str, Any]) -> dict[str, Any]:
    """What makes a row reproducible."""
    return {
        "image_size": grid["image_size"],
        "batch_size": grid["batch_size"],
        "anomalib": version("anomalib"),
        "torch": version("torch"),
        "commit": commit(),
    }
