"""What a grid of the accuracy benchmark says: its data, models and the folders of its runs.

``models`` and ``data`` are mappings from a name to ``class_path`` and ``init_args``; ``seeds``, ``image_size`` and
``batch_size`` hold for all. docs/benchmark.md has every key.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from anomalib.data import AnomalibDataModule, get_datamodule
from anomalib.data.datasets import AnomalibDataset
from anomalib.metrics import AUPRO, Evaluator, F1Max
from anomalib.models import AnomalibModule
from anomalib.utils.serialization import anomalib_safe_globals
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_rdpp.metrics import AUROC


def read_grid(config: Path) -> dict[str, Any]:
    """Read a grid; data with ``categories`` become an entry each, ``mvtecad/bottle``; ``models`` may name a file.

    Raises:
        ValueError: If a key is missing, or neither a model nor its data say for how many epochs.
    """
    grid = read_keys(config, {"seeds", "image_size", "batch_size", "models", "data"}, "accuracy")
    if isinstance(grid["models"], str):
        grid["models"] = yaml.safe_load((config.parent / grid["models"]).read_text())
    grid["data"] = {name: entry for data, part in grid["data"].items() for name, entry in _entries(data, part)}
    for data, part in grid["data"].items():
        for model, own in grid["models"].items():
            if "epochs" not in {**part, **own}:
                msg = f"'{config}' gives no epochs for {model} on {data}: write them at either."
                raise ValueError(msg)
    return grid


def read_keys(config: Path, needed: set[str], benchmark: str) -> dict[str, Any]:
    """Read a YAML file.

    Raises:
        ValueError: If one of the needed keys is missing; names the benchmark that needs it.
    """
    grid = yaml.safe_load(config.read_text()) or {}
    if missing := needed - set(grid):
        msg = f"'{config}' is no grid of the {benchmark} benchmark: it has no {', '.join(sorted(missing))}."
        raise ValueError(msg)
    return grid


def _entries(data: str, part: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Give each category an entry, with its own epochs where ``categories`` is a mapping."""
    if "categories" not in part:
        return [(data, part)]
    entries = []
    for category in part["categories"]:
        entry = {**part, "init_args": {**part.get("init_args", {}), "category": category}}
        if isinstance(part["categories"], dict):
            entry["epochs"] = part["categories"][category]
        entries.append((f"{data}/{category}", entry))
    return entries


def models_on_data(grids: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Map the data of all grids to their models, and each model to its grid.

    Raises:
        ValueError: If two grids have a model of the same name on the same data.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for grid in grids:
        for data in grid["data"]:
            models = found.setdefault(data, {})
            if twice := models.keys() & grid["models"].keys():
                msg = f"Two grids have {', '.join(map(repr, sorted(twice)))} on {data}: rename it in one grid."
                raise ValueError(msg)
            models |= dict.fromkeys(grid["models"], grid)
    return found


def epochs_of(grid: dict[str, Any], data: str, model: str) -> int:
    """Epochs of the model where it names its own, else of the data."""
    return {**grid["data"][data], **grid["models"][model]}["epochs"]


def trainer_options(grid: dict[str, Any], model: str) -> dict[str, Any]:
    """Options of Lightning's Trainer: the model's own, then the grid's."""
    return {**grid.get("trainer", {}), **grid["models"][model].get("trainer", {})}


def run_folder(grid: dict[str, Any], data: str, model: str, seed: int, results: Path) -> Path:
    """Name the folder of a run's checkpoint; grids that differ in size, batch or epochs may share ``results``."""
    return (
        results
        / data
        / model
        / f"{grid['image_size']}px_batch{grid['batch_size']}_{epochs_of(grid, data, model)}epochs_seed{seed}"
    )


def build_datamodule(grid: dict[str, Any], name: str) -> AnomalibDataModule:
    """Build a datamodule, with a part of its images where the grid says so, of all ``joined`` categories as one."""
    part = grid["data"][name]
    init_args = {
        "train_batch_size": grid["batch_size"],
        "eval_batch_size": grid["batch_size"],
        "num_workers": 0,
        "val_split_mode": "same_as_test",
        **part.get("init_args", {}),
    }
    whole: AnomalibDataModule | None = None
    for category in part.get("joined", [None]):
        own = {} if category is None else {"category": category}
        datamodule = get_datamodule({"class_path": part["class_path"], "init_args": init_args | own})
        datamodule.prepare_data()
        datamodule.setup(TrainerFn.FITTING)  # as the trainer does: else it would set up again, and forget the part
        for split, step in (("train", part.get("train_every", 1)), ("test", part.get("test_every", 1))):
            dataset = getattr(datamodule, f"{split}_data")
            in_name_order = dataset.samples["image_path"].sort_values().index
            dataset = dataset.subsample(list(in_name_order[::step]))
            dataset.samples["joined"] = category
            # With pandas 3 the host's MVTec3D leaves NaN for images without mask, and its loader fails on it.
            dataset.samples["mask_path"] = dataset.samples["mask_path"].fillna("")
            before = [] if whole is None else [getattr(whole, f"{split}_data")]
            setattr(datamodule, f"{split}_data", sum(before, dataset))
        whole = datamodule
    return whole


def sets_to_test(grid: dict[str, Any], name: str, datamodule: AnomalibDataModule) -> dict[str, AnomalibDataset]:
    """Name what is tested apart: the test images, of joined categories each category's."""
    names = row_names(grid, name)
    if "joined" not in grid["data"][name]:
        return {names[0]: datamodule.test_data}
    parts = datamodule.test_data.samples.groupby("joined").indices
    categories = grid["data"][name]["joined"]
    return {
        row: datamodule.test_data.subsample(list(parts[category]))
        for row, category in zip(names, categories, strict=True)
    }


def row_names(grid: dict[str, Any], name: str) -> list[str]:
    """Name the data of the rows that a run becomes: one, with joined categories one each."""
    return [f"{name}/{category}" for category in grid["data"][name].get("joined", ())] or [name]


def build_model(grid: dict[str, Any], name: str, has_masks: bool = True) -> AnomalibModule:
    """Build a model with the same metrics and input size for all; those of pixels only where there are masks."""
    module, _, class_name = grid["models"][name]["class_path"].rpartition(".")
    model_class = getattr(import_module(module or "anomalib.models"), class_name)
    size = grid["image_size"]
    return model_class(
        **grid["models"][name].get("init_args", {}),
        pre_processor=model_class.configure_pre_processor((size, size)),
        post_processor=False,
        evaluator=Evaluator(val_metrics=_metrics(has_masks), test_metrics=_metrics(has_masks)),
        visualizer=False,
    )


def _metrics(has_masks: bool) -> list[AUROC | AUPRO | F1Max]:
    """Make the metrics of every model."""
    image, pixel = ["pred_score", "gt_label"], ["anomaly_map", "gt_mask"]
    of_pixels = [AUROC(fields=pixel, prefix="pixel_"), AUPRO(fields=pixel, prefix="pixel_")] if has_masks else []
    return [AUROC(fields=image, prefix="image_"), *of_pixels, F1Max(fields=image, prefix="image_")]


def load_trained(
    grid: dict[str, Any],
    data: str,
    name: str,
    seed: int,
    results: Path,
    has_masks: bool = True,
) -> AnomalibModule:
    """Build a model of a grid and load the newest checkpoint of its run's last epoch.

    Raises:
        FileNotFoundError: If there is none, because the run was not made or not finished.
        ValueError: If it is of another model than the grid's.
    """
    folder = run_folder(grid, data, name, seed, results)
    model = build_model(grid, name, has_masks)
    for path in sorted(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True):
        with anomalib_safe_globals(extra=model.checkpoint_safe_globals()):
            stored = torch.load(path, "cpu", weights_only=True)
        if stored["epoch"] + 1 == epochs_of(grid, data, name):
            _load(model, stored["state_dict"], path, name)
            return model.eval()
    msg = f"No trained model in '{folder}': run `python -m anomalib_rdpp.benchmark accuracy` with this grid first."
    raise FileNotFoundError(msg)


def _load(model: AnomalibModule, state: dict[str, Any], path: Path, name: str) -> None:
    """Load all but the parts that a benchmark gives a model anew."""
    msg = f"'{path}' is of another model than the grid's {name}: run `accuracy` with this grid into another folder."
    try:
        missing, surplus = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # other shapes
        raise ValueError(msg) from error
    for said, keys in (("lacks", missing), ("has besides", surplus)):
        own = [key for key in keys if not key.startswith(("evaluator.", "post_processor."))]
        if own:
            msg = f"{msg} It {said} {own[0]}{f' and {len(own) - 1} more' if len(own) > 1 else ''}."
            raise ValueError(msg)
