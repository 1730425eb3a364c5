"""Build what a grid names: datamodules with a part of their images, models with the same metrics, trained models."""

import logging
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule, get_datamodule
from anomalib.data.datasets import AnomalibDataset
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.metrics import AUPRO, Evaluator, F1Max
from anomalib.models import AnomalibModule
from anomalib.pre_processing import PreProcessor
from anomalib.utils.serialization import anomalib_safe_globals
from lightning.pytorch.trainer.states import TrainerFn
from torchvision.transforms.v2 import CenterCrop, Resize

from anomalib_rdpp.metrics import AUROC

from .grid import epochs_of, row_names, run_folder

logger = logging.getLogger(__name__)

METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO", "image_F1Max")


def build_datamodule(grid: dict[str, Any], name: str) -> AnomalibDataModule:
    """Build a datamodule, with a part of its images where the grid says so, of all ``joined`` categories as one."""
    part, size = grid["data"][name], grid["batch_size"]
    sizes = {"train_batch_size": size, "eval_batch_size": size, "num_workers": 0, "val_split_mode": "same_as_test"}
    whole: AnomalibDataModule | None = None
    for category in part.get("joined", [None]):
        own = {} if category is None else {"category": category}
        init_args = {**sizes, **part.get("init_args", {}), **own}
        datamodule = get_datamodule({"class_path": part["class_path"], "init_args": init_args})
        datamodule.prepare_data()
        datamodule.setup(TrainerFn.FITTING)  # as the trainer does: else it would set up again, and forget the part
        for split, step in (("train", part.get("train_every", 1)), ("test", part.get("test_every", 1))):
            dataset = getattr(datamodule, f"{split}_data")
            in_name_order = dataset.samples["image_path"].sort_values().index
            dataset = dataset.subsample(list(in_name_order[::step]))
            dataset.samples["joined"] = category
            # With pandas 3 anomalib's MVTec3D leaves NaN for images without mask, and its loader fails on it.
            dataset.samples["mask_path"] = dataset.samples["mask_path"].fillna("")
            before = [] if whole is None else [getattr(whole, f"{split}_data")]
            setattr(datamodule, f"{split}_data", sum(before, dataset))
        whole = datamodule
    return whole


def sets_to_test(grid: dict[str, Any], name: str, datamodule: AnomalibDataModule) -> dict[str, AnomalibDataset]:
    """Name what is tested apart: the test images, of joined categories each category's."""
    names, images = row_names(grid, name), datamodule.test_data
    if "joined" not in grid["data"][name]:
        return {names[0]: images}
    parts = images.samples.groupby("joined").indices
    return {row: images.subsample(list(parts[row.removeprefix(f"{name}/")])) for row in names}


def in_row(metrics: dict[str, Any], images: AnomalibDataset, name: str) -> dict[str, float]:
    """Round the metrics that rows have; those that tell normal from abnormal are nothing where all are of one kind."""
    known = METRICS
    if not (images.has_normal and images.has_anomalous):
        kind = "defects" if images.has_anomalous else "normal"
        logger.warning("all test images of %s are %s: metrics that need both kinds stay empty", name, kind)
        known = [metric for metric in METRICS if images.has_anomalous and metric.startswith("pixel")]
    return {metric: round(float(metrics[metric]), 4) for metric in known if metrics.get(metric) is not None}


def class_of(entry: dict[str, Any]) -> type[AnomalibModule]:
    """Import the class of a model's entry; without a module it is anomalib's."""
    module, _, name = entry["class_path"].rpartition(".")
    return getattr(import_module(module or "anomalib.models"), name)


def build_pre_processor(entry: dict[str, Any], size: int) -> PreProcessor:
    """Make a model's own pre-processor for square images, of its own size where it can't take the one wanted."""
    model_class, size = class_of(entry), entry.get("image_size", size)
    try:
        return model_class.configure_pre_processor((size, size))
    except ValueError as error:  # its crop is larger
        logger.warning("%s keeps its own image size: %s", model_class.__name__, error)
        return model_class.configure_pre_processor()


def sides(pre_processor: PreProcessor, size: int) -> tuple[int, int]:
    """Side of the square that images of ``size`` are resized to, and of what the network sees of it after a crop."""
    found = [size]
    for kind in (Resize, CenterCrop):
        sizes = [each.size for each in extract_transforms_by_type(pre_processor.transform, kind)]
        found.append(min((each if isinstance(each, int) else each[-1] for each in sizes), default=found[-1]))
    return found[1], found[2]


def build_model(grid: dict[str, Any], name: str) -> AnomalibModule:
    """Build a model with the same metrics and input size for all; those of pixels count where there are masks."""
    entry = grid["models"][name]
    return class_of(entry)(
        **entry.get("init_args", {}),
        pre_processor=build_pre_processor(entry, grid["image_size"]),
        post_processor=False,
        evaluator=Evaluator(val_metrics=_metrics(), test_metrics=_metrics()),
        visualizer=False,
    )


def _metrics() -> list[AUROC | AUPRO | F1Max]:
    """Make the metrics of every model."""
    image, pixel = ["pred_score", "gt_label"], ["anomaly_map", "gt_mask"]
    of_pixels = [metric(fields=pixel, prefix="pixel_", strict=False) for metric in (AUROC, AUPRO)]
    return [AUROC(fields=image, prefix="image_"), *of_pixels, F1Max(fields=image, prefix="image_")]


def load_trained(grid: dict[str, Any], data: str, name: str, seed: int, results: Path) -> AnomalibModule:
    """Build a model of a grid and load the newest checkpoint of its run's last epoch.

    Raises:
        FileNotFoundError: If there is none, because the run was not made or not finished.
        ValueError: If it is of another model than the grid's.
    """
    folder = run_folder(grid, data, name, seed, results)
    model = build_model(grid, name)
    for path in sorted(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True):
        with anomalib_safe_globals(extra=model.checkpoint_safe_globals()):
            stored = torch.load(path, "cpu", weights_only=True)
        if epochs_of(grid, data, name) - stored["epoch"] not in (0, 1):  # stored after the fit, or at its last epoch
            continue
        given, known = (
            {key: value for key, value in state.items() if not key.startswith(("evaluator.", "post_processor."))}
            for state in (stored["state_dict"], model.state_dict())
        )
        try:
            model.load_state_dict(given, strict=False)
        except RuntimeError:  # other shapes
            known = {}
        if other := sorted(given.keys() ^ known.keys()):
            msg = (
                f"'{path}' is of another model than the grid's {name} ({other[0]}): run `accuracy` into another folder."
            )
            raise ValueError(msg)
        return model.eval()
    msg = f"No trained model in '{folder}': run `python -m anomalib_rdpp.benchmark accuracy` with this grid first."
    raise FileNotFoundError(msg)
