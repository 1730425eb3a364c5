"""RD++ from end to end on generated images: ``python -m anomalib_rdpp.demo [--output demo_results] [--seed 0]``."""
# ruff: noqa: T201  a demo talks

import argparse
import csv
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image, read_mask
from anomalib.deploy import ExportType, OpenVINOInferencer
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, Evaluator
from anomalib.post_processing import PostProcessor
from lightning import seed_everything
from lightning.pytorch.callbacks import TQDMProgressBar
from matplotlib import pyplot as plt
from matplotlib.cm import ScalarMappable

from anomalib_rdpp import RDPP
from anomalib_rdpp.metrics import AUROC

from .surfaces import DEFECTS, make_surfaces, read_surfaces
from .teacher import choose_teacher

TOLERANCE = 1e-4  # between torch and OpenVINO, relative to the range of the maps


class Prediction(NamedTuple):
    """One test image and what torch says of it."""

    kind: str
    image: np.ndarray  # (H, W, 3) in [0, 1]
    mask: np.ndarray  # (H, W), True where defective
    anomaly_map: np.ndarray  # (H, W)
    score: float


def run_demo(
    output: Path,
    *,
    seed: int = 0,
    epochs: int = 30,
    size: int = 128,
    train: int = 60,
    test: int = 40,
    pre_trained: bool = True,
) -> dict[str, float | str]:
    """Generate images, train and test RD++, draw heat maps, export, compare OpenVINO with torch.

    Args:
        output: Folder for everything.
        seed: Of data and training.
        epochs: Length of the training; the last epoch is tested.
        size: Side of the images in pixels, a multiple of 32.
        train: Training images.
        test: Test images, half of them defective. Half as many again are drawn to set the thresholds on.
        pre_trained: Take ImageNet weights for the teacher if they can be had.

    Returns:
        The results by name, also written to ``results.csv``.
    """
    start = time.perf_counter()
    seed_everything(seed, workers=True, verbose=False)
    print(f"1/5 Drawing {train} training and {test + test // 2} test images of woven cloth ...", flush=True)
    make_surfaces(output / "data", train=train, good=test * 3 // 4, defective=test * 3 // 4, size=size, seed=seed)
    datamodule = read_surfaces(output / "data", seed)

    teacher = choose_teacher(pre_trained)
    model = _model(size, teacher)
    engine = Engine(
        max_epochs=epochs,
        default_root_dir=output,
        check_val_every_n_epoch=epochs,  # once, to set the thresholds
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=False,
        enable_model_summary=False,
        callbacks=[TQDMProgressBar()],  # shows in a file or pipe too
    )
    print(f"2/5 Training RD++ for {epochs} epochs ...", flush=True)
    engine.fit(model, datamodule=datamodule)
    print("3/5 Testing ...", flush=True)
    metrics = engine.test(model, datamodule=datamodule, verbose=False)[0]

    print("4/5 Exporting to OpenVINO ...", flush=True)
    exported = engine.export(model, ExportType.OPENVINO, output, input_size=(size, size))
    print("5/5 Comparing OpenVINO with torch, drawing heat maps ...", flush=True)
    predictions, difference = _compare(model, exported, datamodule)
    _draw(predictions, model.post_processor, output / "heat_maps")

    results = {
        "teacher": "ImageNet" if teacher["pre_trained"] else "RANDOM",
        "image AUROC": round(metrics["image_AUROC"], 4),
        "pixel AUROC": round(metrics["pixel_AUROC"], 4),
        "AUPRO": round(metrics["pixel_AUPRO"], 4),
        "OpenVINO - torch": difference,
        "seconds": round(time.perf_counter() - start),
        "seed": seed,
        "epochs": epochs,
        "train images": len(datamodule.train_data),
        "test images": len(datamodule.test_data),
        "images for thresholds": len(datamodule.val_data),
    }
    places = {
        "heat maps": output / "heat_maps",
        "images and masks": output / "data",
        "checkpoint": engine.best_model_path,
        "OpenVINO model": exported,
        "these results": output / "results.csv",
    }
    _report(results, places)
    return results


def _model(size: int, teacher: dict[str, str | bool]) -> RDPP:
    """Build RD++ with the metrics of the papers."""
    return RDPP(
        **teacher,
        pre_processor=RDPP.configure_pre_processor((size, size)),
        # Raw maps: normalised ones are clamped, which hides differences and makes ties in the metrics.
        post_processor=PostProcessor(enable_normalization=False),
        evaluator=Evaluator(
            test_metrics=[
                AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
                AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
                AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
            ],
        ),
        visualizer=False,
    )


@torch.no_grad()
def _compare(model: RDPP, exported: Path, datamodule: Folder) -> tuple[list[Prediction], float]:
    """Run torch and OpenVINO on each test image.

    Returns:
        Torch's predictions and the largest difference of any pixel or score, relative to the range of the maps.
    """
    # Single precision as in torch: OpenVINO takes bfloat16 by itself where the CPU has it.
    openvino = OpenVINOInferencer(exported, device="CPU", config={"INFERENCE_PRECISION_HINT": "f32"})
    model.eval()
    predictions, differences = [], []
    for sample in datamodule.test_data.samples.sort_values("image_path").itertuples():
        image = read_image(sample.image_path, as_tensor=True)
        ours = model(image.unsqueeze(0).to(model.device))
        theirs = openvino.predict(image)
        anomaly_map, score = ours.anomaly_map.squeeze().cpu().numpy(), float(ours.pred_score)
        differences += [np.abs(anomaly_map - theirs.anomaly_map.squeeze()).max(), abs(score - theirs.pred_score.item())]
        mask = read_mask(sample.mask_path) > 0 if sample.label_index else np.zeros(anomaly_map.shape, dtype=bool)
        kind = Path(sample.image_path).parent.name
        predictions.append(Prediction(kind, image.permute(1, 2, 0).numpy(), mask, anomaly_map, score))
    maps = np.stack([prediction.anomaly_map for prediction in predictions])
    return predictions, float(max(differences) / (maps.max() - maps.min()))


def _draw(predictions: list[Prediction], thresholds: PostProcessor, folder: Path) -> None:
    """Write a sheet of each kind of image, and one with an example of every kind."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {kind: [p for p in predictions if p.kind == kind] for kind in ("good", *DEFECTS)}
    low = np.median([p.anomaly_map for p in predictions])
    levels = float(low), float(thresholds.pixel_threshold), float(thresholds.image_threshold)
    _overview([rows[0] for rows in kinds.values() if rows], levels, folder / "overview.png")
    for kind, rows in kinds.items():
        if rows:
            _sheet(rows[:10], levels, folder / f"{kind}.png")


def _overview(columns: Sequence[Prediction], levels: tuple[float, float, float], path: Path) -> None:
    """Draw a column per kind, landscape: image, truth, heat map."""
    figure, axes = plt.subplots(3, len(columns), figsize=(9, 4.5), squeeze=False, layout="constrained")
    for column, p in zip(axes.T, columns, strict=True):
        column[0].set_title(p.kind.replace("_", " "), fontsize=10)
        column[2].set_xlabel(f"score {p.score:.2f}: {_verdict(p, levels)}", fontsize=8)
        column[0].imshow(p.image)
        column[1].imshow(p.mask, cmap="gray", vmin=0, vmax=1)
        drawn = _heat_map(column[2], p, levels)
    for row, name in zip(axes, ("image", "truth", "heat map"), strict=True):
        row[0].set_ylabel(name, fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    bar = figure.colorbar(drawn, ax=axes, shrink=0.3, anchor=(0, 0.06), aspect=12, pad=0.01, ticks=[levels[1]])
    bar.ax.set_yticklabels(["threshold"], fontsize=8, rotation=90, va="center")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _sheet(rows: Sequence[Prediction], levels: tuple[float, float, float], path: Path) -> None:
    """Draw a row per image of one kind."""
    _, pixel, image = levels
    figure, axes = plt.subplots(len(rows), 4, figsize=(10, 2.6 * len(rows)), squeeze=False, layout="constrained")
    for axis, title in zip(axes[0], ("image", "defect (truth)", "heat map", "truth green, found red"), strict=True):
        axis.annotate(title, (0.5, 1.16), xycoords="axes fraction", ha="center", weight="bold")
    for row, p in zip(axes, rows, strict=True):
        row[0].set_title(p.kind.replace("_", " "), fontsize=9)
        row[2].set_title(f"score {p.score:.2f}, threshold {image:.2f}: {_verdict(p, levels)}", fontsize=9)
        row[0].imshow(p.image)
        row[1].imshow(p.mask, cmap="gray", vmin=0, vmax=1)
        drawn = _heat_map(row[2], p, levels)
        row[3].imshow(p.image)
        for field, level, colour in ((p.mask, 0.5, "lime"), (p.anomaly_map, pixel, "red")):
            if field.min() < level < field.max():
                row[3].contour(field, [level], colors=colour, linewidths=1.2)
        for axis in row:
            axis.set_axis_off()
    figure.colorbar(drawn, ax=axes, shrink=0.5, label="anomaly map (middle of the scale: threshold of a pixel)")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _heat_map(axis: plt.Axes, p: Prediction, levels: tuple[float, float, float]) -> ScalarMappable:
    """Draw a map on the one colour scale of all sheets."""
    low, pixel, _ = levels
    return axis.imshow(p.anomaly_map, cmap="inferno", vmin=low, vmax=low + 2 * max(pixel - low, 1e-6))


def _verdict(p: Prediction, levels: tuple[float, float, float]) -> str:
    """Compare a score with the threshold of an image."""
    return "defective" if p.score > levels[2] else "good"


def _report(results: dict[str, float | str], places: dict[str, Path | str]) -> None:
    """Print the tables and write the results."""
    with Path(places["these results"]).open("w", newline="") as file:
        csv.writer(file).writerows(results.items())
    agrees = "agrees" if results["OpenVINO - torch"] <= TOLERANCE else "DIFFERS"
    shown = {**results, "OpenVINO - torch": f"{results['OpenVINO - torch']:.1e} of the maps' range: {agrees}"}
    print()
    for table in (shown, places):
        for name, value in table.items():
            print(f"{name:<22} {value}")
        print()


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m anomalib_rdpp.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo_results"), help="folder for everything")
    parser.add_argument("--seed", type=int, default=0, help="of data and training, 0 or more")
    chosen = parser.parse_args(arguments)
    if not 0 <= chosen.seed < 2**32:
        parser.error(f"--seed takes a number from 0 to 4294967295, got {chosen.seed}")
    if chosen.output.exists() and not chosen.output.is_dir():
        parser.error(f"--output takes a folder, '{chosen.output}' is a file")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)  # anomalib's and Lightning's; what goes wrong is still raised
    mpl.use("Agg")
    run_demo(chosen.output, seed=chosen.seed)


if __name__ == "__main__":
    main()
