"""Accuracy that is left in each precision: the trained models of an accuracy grid, exported and tested again."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import nncf
import numpy as np
import openvino as ov
import pandas as pd
import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.models import AnomalibModule
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Compose, Resize
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from anomalib_rdpp.export import calibration_images

from .build import METRICS, build_datamodule, in_row, load_trained, sides
from .exports import PRECISIONS, export
from .grid import read_grid, refuse_unknown
from .probe import has_bfloat16, load_runner
from .results import Results, commit, markdown

KEY = ("data", "image_size", "model", "seed", "precision")
FACTS = ("calibration_images", "test_images", *METRICS, "openvino", "nncf", "commit", "input_size", "error")
precision_results = partial(Results, "anomalib_rdpp.benchmark precision", (*KEY, *FACTS), KEY, METRICS)


def run_precision(
    grid: Path, results: Path = Path("results"), output: Path = Path("results/precision.csv"), seed: int = 0,
    data: Sequence[str] | None = None, models: Sequence[str] | None = None, precisions: Sequence[str] = (*PRECISIONS,),
) -> str:  # fmt: skip
    """Test an accuracy grid's trained models in torch and OpenVINO's FP32, FP16, bfloat16 and INT8.

    What fails becomes a row with its error, and the others go on; the next call tries it again.

    Args:
        grid: YAML grid that ``accuracy`` was given.
        results: Folder of its CSV, where the checkpoints are.
        output: CSV file, appended to; rows that are there are not run again.
        seed: Of the runs.
        data: Names of the grid's data, all by default.
        models: Names of the grid's models, all by default.
        precisions: Of 'torch', 'fp32', 'fp16', 'bf16', 'int8' and 'int8, bf16'.

    Returns:
        A Markdown table of the CSV.

    Raises:
        ValueError: If data, model or precision is unknown.
    """
    refuse_unknown(precisions, PRECISIONS)
    rows = precision_results(output)
    for row, trained in each_trained(grid, results, rows, seed, data, models, precisions):
        with rows.run(row):
            label = ", ".join(row[name] for name in ("data", "model", "precision"))
            rows.append({**row, **trained.test(_in_precision(trained, row["precision"]), label)})
    return precision_table(rows)


Answer = Callable[[np.ndarray], Mapping[str, Any]]  # from an image to map and score


class Trained(NamedTuple):
    """A trained model beside its data."""

    model: AnomalibModule
    datamodule: AnomalibDataModule
    size: int  # of the images that the exported model takes
    folder: Path  # of its exports

    def calibration(self) -> list[torch.Tensor]:
        """Load up to 300 training images without augmentation."""
        return [resize(batch.image, [self.size, self.size]) for batch in calibration_images(self.datamodule)]

    def test(self, answer: Answer, label: str) -> dict[str, float]:
        """Compute the metrics over the test images, one by one."""
        images, transform = self.datamodule.test_data, self.model.pre_processor.transform
        # Resizes image and mask, as the trainer does; what else there is to do, the exported model does itself.
        resizing, crop = (extract_transforms_by_type(transform, kind) for kind in (Resize, CenterCrop))
        dataset = images.subsample(range(len(images)))
        dataset.augmentations = Compose(resizing or [Resize([self.size, self.size])])
        metrics = self.model.evaluator.test_metrics
        for metric in metrics:
            metric.reset()
        for batch in tqdm(DataLoader(dataset, collate_fn=dataset.collate_fn), desc=label, unit="image"):
            found = answer(batch.image.numpy())
            known = {name: found.get(name) for name in ("anomaly_map", "pred_score")}
            values = {name: torch.as_tensor(value) for name, value in known.items() if value is not None}
            update = ImageBatch(image=batch.image, gt_label=batch.gt_label, gt_mask=batch.gt_mask, **values)
            for each in crop:  # the model has done it
                update.image, update.gt_mask = each(update.image, update.gt_mask)
            for metric in metrics:
                metric.update(update)
        return in_row({metric.name: metric.compute() for metric in metrics}, images, label)


def each_trained(
    grid: Path, results: Path, rows: Results, seed: int,
    data: Sequence[str] | None, models: Sequence[str] | None, precisions: Iterable[str],
) -> Iterator[tuple[dict[str, Any], Trained]]:  # fmt: skip
    """Give a grid's trained models with each row that is to be found; a model that can't be loaded is told in them."""
    settings = read_grid(grid)
    refuse_unknown(data, settings["data"])
    refuse_unknown(models, settings["models"])
    for part, name in product(data or settings["data"], models or settings["models"]):
        run = {"data": part, "image_size": settings["image_size"], "model": name, "seed": seed}
        missing = [row for precision in precisions if not rows.done(row := {**run, "precision": precision})]
        if not missing:
            continue
        with rows.run(*missing), TemporaryDirectory() as folder:
            datamodule = build_datamodule(settings, part)
            model = load_trained(settings, part, name, seed, results)
            size, seen = sides(model.pre_processor, settings["image_size"])
            facts = {
                "calibration_images": len(calibration_images(datamodule)), "test_images": len(datamodule.test_data),
                "input_size": seen, "openvino": ov.__version__.split("-")[0], "nncf": nncf.__version__,
            }  # fmt: skip
            for row in missing:
                yield {**row, **facts, "commit": commit()}, Trained(model, datamodule, size, Path(folder))


def _in_precision(trained: Trained, precision: str) -> Answer:
    """Give the model in a precision."""
    kind, arithmetic = PRECISIONS[precision]
    if arithmetic == "bf16" and not has_bfloat16():
        msg = "This CPU has no bfloat16."
        raise ValueError(msg)
    path = export(trained.model, kind, trained.folder, trained.size, trained.calibration)
    return load_runner(path, torch.get_num_threads(), trained.size, arithmetic)


def precision_table(results: Results) -> str:
    """Make a Markdown table: percent, and the difference to torch in points; what failed is in the CSV alone."""
    rows, lines = results.frame(), []
    for run, own in rows[rows["error"] == ""].groupby(list(KEY[:-1]), sort=False):
        reference = own[own["precision"] == "torch"].iloc[:1]
        for row in own.to_dict("records"):
            line = dict(zip(("data", "px", "model", "seed"), run, strict=True)) | {"precision": row["precision"]}
            for metric in METRICS:
                cell = "-" if pd.isna(row[metric]) else f"{100 * row[metric]:.1f}"
                for value in reference[metric] if row["precision"] != "torch" and cell != "-" else ():
                    cell += f" ({100 * (row[metric] - value):+.1f})"
                line[metric.replace("_", " ")] = cell
            lines.append(line)
    return markdown(lines)
