"""Accuracy of models on equal terms: models x data x seeds, one CSV row each, written as soon as it is known.

Protocol: a fixed number of epochs, the last one is tested once; no validation, no early stopping, nothing is chosen on
test data. A row that is in the CSV is not run again; a run that fails becomes a row with its error, and the next call
tries it again. ``best_on_test`` does what the official code does, and its rows say so.
"""

import gc
import logging
import platform
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from lightning import Callback, Trainer, seed_everything

from .build import METRICS, build_datamodule, build_model, in_row, sets_to_test, sides
from .grid import epochs_of, read_grid, row_names, run_folder, runs_of
from .probe import peak_mib, reset_peak
from .results import Results, commit

logger = logging.getLogger(__name__)

KEY = ("data", "model", "seed", "epochs", "image_size", "batch_size", "protocol")
PROTOCOLS = ("last", "best on test")
COLUMNS = (
    "data", "model", "seed", "epochs", "steps", "train_images", "test_images", "image_size", "batch_size",
    *METRICS,
    "fit_seconds", "test_seconds", "peak_memory_mib", "parameters", "anomalib", "torch", "commit", "device",
    "protocol", "teacher", "gpu_memory_mib", "input_size", "fit_cpu_minutes", "error",
)  # fmt: skip
NUMBERS, BEFORE = (*METRICS, "epochs", "steps", "fit_seconds", "fit_cpu_minutes"), {"protocol": PROTOCOLS[0]}
accuracy_results = partial(Results, "anomalib_rdpp.benchmark accuracy", COLUMNS, KEY, NUMBERS, before=BEFORE)


def run_accuracy(
    grids: Sequence[Path], output: Path = Path("results/accuracy.csv"), shard: str = "1/1", best_on_test: bool = False
) -> None:
    """Train and test models x data x seeds, one CSV row each.

    Args:
        grids: YAML grids, see docs/benchmark.md.
        output: CSV file, appended to; rows in it are kept and not run again. Its folder also takes the checkpoints.
        shard: i/n runs every n-th run from the i-th, so that machines can share a grid.
        best_on_test: Test after every epoch and report that of the highest image AUROC on the TEST images, as the
            official code does. Rows and tables say so; by default the last epoch is reported.

    Raises:
        ValueError: If a grid, the CSV or the shard is not as it should be.
    """
    index, _, count = shard.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        msg = f"A shard is i/n with 1 <= i <= n, 2/8 for instance, got '{shard}'."
        raise ValueError(msg)
    results = accuracy_results(output)
    for grid in [read_grid(path) for path in grids]:  # all are read before the first run
        runs = runs_of(grid)[int(index) - 1 :: int(count)]
        for number, (data, model, seed) in enumerate(runs, 1):
            facts = {
                "model": model, "seed": seed, "epochs": epochs_of(grid, data, model), "image_size": grid["image_size"],
                "batch_size": grid["batch_size"], "teacher": grid.get("teacher", ""), "commit": commit(),
                "protocol": PROTOCOLS[best_on_test], "anomalib": version("anomalib"), "torch": version("torch"),
            }  # fmt: skip
            rows = {name: {"data": name, **facts} for name in row_names(grid, data)}
            if all(map(results.done, rows.values())):
                continue
            logger.warning("run %d of %d: %s on %s, seed %d", number, len(runs), model, data, seed)
            with results.run(*rows.values()):
                found = _train_and_test(grid, data, model, seed, output.parent, best_on_test)
                for name, row in rows.items():
                    results.append({**row, **found[name]})


def _train_and_test(
    grid: dict[str, Any], data: str, model: str, seed: int, folder: Path, best_on_test: bool
) -> dict[str, dict[str, Any]]:
    """Train one model for its epochs, test it once, on joined categories once each; a row's figures by its data."""
    seed_everything(seed, workers=True)
    gc.collect()  # a trainer and its model hold each other
    reset_peak()
    for device in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        torch.cuda.reset_peak_memory_stats(device)
    datamodule, module, every_epoch = build_datamodule(grid, data), build_model(grid, model), _EveryEpoch(data)
    options = {"limit_val_batches": 0, **grid.get("trainer", {}), **grid["models"][model].get("trainer", {})}
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
    start, cpu_start = time.perf_counter(), time.process_time()
    engine.fit(module, datamodule=datamodule)
    device = engine.trainer.strategy.root_device
    facts = {
        "steps": engine.trainer.global_step,
        "train_images": len(datamodule.train_data),
        "fit_seconds": round(time.perf_counter() - start),
        "fit_cpu_minutes": round((time.process_time() - cpu_start) / 60, 2),  # of all threads, without workers
        "parameters": sum(p.numel() for p in module.parameters()),
        "device": f"{device} {platform.machine()}",
        "input_size": sides(module.pre_processor, grid["image_size"])[1],
    }
    tested = {data: every_epoch.best()} if best_on_test else {}
    for name, images in {} if best_on_test else sets_to_test(grid, data, datamodule).items():
        datamodule.test_data, start = images, time.perf_counter()
        metrics = engine.test(module, datamodule=datamodule, verbose=False)[0]
        tested[name] = {"test_images": len(images), "test_seconds": round(time.perf_counter() - start)}
        tested[name] |= in_row(metrics, images, name)
    facts["peak_memory_mib"] = peak_mib()
    if device.type == "cuda":
        facts["gpu_memory_mib"] = torch.cuda.max_memory_allocated(device) // 2**20
    return {name: {**facts, **results} for name, results in tested.items()}


class _EveryEpoch(Callback):
    """Keep the metrics of each epoch's validation, which is on the test images here."""

    def __init__(self, data: str) -> None:
        self.data = data
        self.results: list[dict[str, Any]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: AnomalibModule) -> None:
        """Take what the evaluator has logged."""
        del pl_module
        images = trainer.datamodule.val_data
        self.results.append({"test_images": len(images), **in_row(trainer.callback_metrics, images, self.data)})

    def best(self) -> dict[str, Any]:
        """Give the metrics of the epoch with the highest image AUROC."""
        return max(self.results, key=lambda results: results.get("image_AUROC", 0))
