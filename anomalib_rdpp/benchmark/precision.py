"""Accuracy that is left in each precision: the trained models of an accuracy grid, exported and tested again."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nncf
import openvino as ov
import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.models import AnomalibModule
from nncf.quantization.range_estimator import RangeEstimatorParametersSet
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Compose, Resize
from tqdm import tqdm

from anomalib_rdpp.export import calibration_images, quantize

from .accuracy import METRICS
from .grid import build_datamodule, load_trained, read_grid
from .probe import has_bfloat16
from .rows import append_row, commit, read_rows

logger = logging.getLogger(__name__)

KEY = ("data", "image_size", "model", "seed", "precision")
COLUMNS = (*KEY, "calibration_images", "test_images", *METRICS, "openvino", "nncf", "commit", "error")
# What INT8 was chosen from; the first is what an export with int8_ptq does.
INT8 = {
    "int8": {},
    "int8, NNCF's ranges": {
        "advanced_parameters": nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
    },
    "int8, 8 bits of weights": {
        "advanced_parameters": nncf.AdvancedQuantizationParameters(
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
        )
    },
    "int8, mixed preset": {"preset": nncf.QuantizationPreset.MIXED},
    "int8, map too": {"ignored_scope": nncf.IgnoredScope()},
}
PRECISIONS = ("torch", "fp32", "fp16", "bf16", *INT8, "int8, bf16")


def run_precision(
    config: Path,
    results: Path,
    output: Path,
    seed: int = 0,
    data: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    precisions: Sequence[str] = PRECISIONS,
) -> None:
    """Test the grid's trained models in torch and in OpenVINO fp32, fp16, bfloat16 and INT8, a row each.

    What fails becomes a row with its error, and the others go on; the next call tries it again.

    Args:
        config: Grid that ``run_accuracy`` was given.
        results: Folder of its CSV, where the checkpoints are.
        output: CSV file, appended to; rows that are there are not run again.
        seed: Of the runs.
        data: Which of the grid's data, all by default.
        models: Which of the grid's models, all by default.
        precisions: Which of ``PRECISIONS``.

    Raises:
        ValueError: If data, model or precision is unknown.
    """
    grid = read_grid(config)
    for chosen, known in ((data, grid["data"]), (models, grid["models"]), (precisions, PRECISIONS)):
        if unknown := set(chosen or ()) - set(known):
            msg = f"Unknown {', '.join(map(repr, sorted(unknown)))}; choose of {', '.join(map(repr, known))}."
            raise ValueError(msg)
    for part in data or grid["data"]:
        for name in models or grid["models"]:
            done = {tuple(row[key] for key in KEY) for row in read_rows(output, COLUMNS) if not row["error"]}
            run = {"data": part, "image_size": grid["image_size"], "model": name, "seed": seed}
            missing = [precision for precision in precisions if (*map(str, run.values()), precision) not in done]
            try:
                for row in _rows(grid, run, results, missing):
                    append_row(output, COLUMNS, row)
            except Exception as error:  # before the first precision
                logger.exception("%s on %s failed", name, part)
                failure = {**run, "commit": commit(), "error": f"{type(error).__name__}: {error}"}
                for precision in missing:
                    append_row(output, COLUMNS, {**failure, "precision": precision})


def _rows(grid: dict[str, Any], run: dict[str, Any], results: Path, missing: list[str]) -> Iterator[dict[str, Any]]:
    """Export one trained model, test each precision that is missing; one that fails is a row with its error."""
    if not missing:
        return
    datamodule = build_datamodule(grid, run["data"])
    model = load_trained(
        grid, run["data"], run["model"], run["seed"], results, has_masks=datamodule.task == "segmentation"
    )
    facts = {
        **run,
        "calibration_images": len(calibration_images(datamodule)),
        "test_images": len(datamodule.test_data),
        "openvino": ov.__version__.split("-")[0],
        "nncf": nncf.__version__,
        "commit": commit(),
    }
    with TemporaryDirectory() as folder:
        answers = _answers(model, grid["image_size"], datamodule, Path(folder))
        for precision in missing:
            label = f"{run['data']}, {run['model']}, {precision}"
            try:
                found: dict[str, Any] = _test(model, answers[precision](), datamodule, label)
            except Exception as error:
                logger.exception("%s failed", label)
                found = {"error": f"{type(error).__name__}: {error}"}
            yield {**facts, "precision": precision, **found}


Answer = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def _answers(
    model: AnomalibModule,
    size: int,
    datamodule: AnomalibDataModule,
    folder: Path,
) -> dict[str, Callable[[], Answer]]:
    """By precision, what makes the model in it: a function from images ``(1, 3, H, W)`` to map and score."""
    core = ov.Core()

    @cache
    def fp32() -> ov.Model:
        return core.read_model(model.to_openvino(folder, input_size=(size, size), onnx_kwargs={"dynamic_shapes": None}))

    def openvino(network: ov.Model, arithmetic: str = "f32") -> Answer:
        if arithmetic == "bf16" and not has_bfloat16():
            msg = "This CPU has no bfloat16."
            raise ValueError(msg)
        compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": arithmetic})

        def answer(images: torch.Tensor) -> dict[str, torch.Tensor]:
            found = compiled(images.numpy())
            return {name: torch.from_numpy(found[name]) for name in ("anomaly_map", "pred_score")}

        return answer

    @torch.no_grad()
    def pytorch(images: torch.Tensor) -> dict[str, torch.Tensor]:
        found = model(images)
        return {"anomaly_map": found.anomaly_map, "pred_score": found.pred_score}

    def half() -> Answer:
        ov.save_model(fp32(), folder / "fp16.xml", compress_to_fp16=True)  # as the host's fp16
        return openvino(core.read_model(folder / "fp16.xml"))

    @cache
    def quantized(name: str) -> ov.Model:
        return quantize(fp32(), datamodule, **INT8[name])

    def in_int8(name: str, arithmetic: str = "f32") -> Answer:
        return openvino(quantized(name), arithmetic)

    return {
        "torch": lambda: pytorch,
        "fp32": lambda: openvino(fp32()),
        "fp16": half,
        "bf16": lambda: openvino(fp32(), "bf16"),
        **{name: partial(in_int8, name) for name in INT8},
        "int8, bf16": partial(in_int8, "int8", "bf16"),
    }


def _test(model: AnomalibModule, answer: Answer, datamodule: AnomalibDataModule, label: str) -> dict[str, float]:
    """Compute the metrics over the test images, one by one."""
    dataset = datamodule.test_data.subsample(range(len(datamodule.test_data)))
    # Resizes image and mask, as the trainer does; what else the pre-processor does, the exported model does itself.
    resizing = extract_transforms_by_type(model.pre_processor.transform, Resize)
    dataset.augmentations = Compose(resizing) if resizing else None
    metrics = model.evaluator.test_metrics
    for metric in metrics:
        metric.reset()
    for batch in tqdm(DataLoader(dataset, collate_fn=dataset.collate_fn), desc=label, unit="image"):
        found = answer(batch.image)
        update = ImageBatch(
            image=batch.image,
            gt_label=batch.gt_label,
            gt_mask=batch.gt_mask,
            anomaly_map=found["anomaly_map"].squeeze(1),
            pred_score=found["pred_score"],
        )
        for metric in metrics:
            metric.update(update)
    return {metric.name: round(float(metric.compute()), 4) for metric in metrics if metric.name in METRICS}


def precision_table(path: Path) -> str:
    """Make a Markdown table: percent, and the difference to torch in points; what failed is in the CSV alone."""
    rows: list[dict[str, Any]] = [row for row in read_rows(path, COLUMNS) if not row["error"]]
    lines = [
        "| data | px | model | seed | precision | " + " | ".join(name.replace("_", " ") for name in METRICS) + " |",
        "|" + "---|" * (len(METRICS) + 5),
    ]
    reference = {_run(row): row for row in rows if row["precision"] == "torch"}
    for row in rows:
        cells = []
        for metric in METRICS:
            if not row[metric]:
                cells.append("-")
                continue
            value = 100 * float(row[metric])
            cells.append(f"{value:.1f}")
            if row["precision"] != "torch" and _run(row) in reference:
                cells[-1] += f" ({value - 100 * float(reference[_run(row)][metric]):+.1f})"
        lines.append(f"| {' | '.join([*_run(row), row['precision'], *cells])} |")
    return "\n".join(lines)


def _run(row: dict[str, str]) -> tuple[str, ...]:
    """Which run a row is of."""
    return tuple(row[name] for name in KEY[:-1])
