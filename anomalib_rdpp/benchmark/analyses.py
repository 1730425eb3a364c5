"""The papers' analyses of trained models: what the student sees, and how well the map tells normal from abnormal.

*Compactness*: how far normal test images are from each other in the features that the student sees: the teacher's for
RD, projected for RD++, amplified for AAND. *Suppression*: the same from each abnormal image to every normal one, and
how far features move where noise is put on a normal image. *Discrepancy*: the map on normal and on abnormal pixels.

Source: Tien et al., CVPR 2023, section 4 (compactness, suppression); Tang et al., IEEE TIP 2026 (score histograms).
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anomalib.data.datasets import AnomalibDataset
from anomalib.models import AnomalibModule
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Resize
from tqdm import tqdm

from .features import SCALES, feature_distances, has_student
from .grid import build_datamodule, epochs_of, load_trained, models_on_data, read_grid
from .histograms import BINS, Analysis, draw_histograms
from .report import mean_and_spread
from .rows import append_row, commit, read_rows

logger = logging.getLogger(__name__)

KEY = ("data", "image_size", "model", "seed", "epochs")
# "teacher" and "student" stand for the features that the teacher gives and those that the student sees.
FIGURES = (
    *(f"{features}_{figure}{scale}"
      for features in ("teacher", "student")
      for figure in ("normal_mse", "abnormal_mse", "normal", "abnormal", "noise")
      for scale in ("", *(f"_{scale}" for scale in SCALES))),
    "normal_pixels", "abnormal_pixels", "pixel_overlap",
)  # fmt: skip
COLUMNS = (*KEY, "normal_images", "abnormal_images", *FIGURES, "commit", "error")
DIGITS = (".3g", ".1g")  # of a mean, of its spread
IMAGES = 40  # normal and abnormal ones whose features are compared, evenly picked: 780 and 1600 pairs


def run_analyses(
    configs: Sequence[Path],
    results: Path,
    output: Path,
    seed: int = 0,
    data: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
) -> list[Path]:
    """Analyse trained models, a CSV row each, and draw a picture per data set.

    Args:
        configs: Grids that ``run_accuracy`` was given; each on its own data.
        results: Folder of its CSV, where the checkpoints are.
        output: CSV file, appended to; pictures go beside it.
        seed: Of the runs, and of the noise.
        data: Which of the data, all by default.
        models: Which of the models, all by default.

    Returns:
        The pictures. A model that fails becomes a row with its error.

    Raises:
        ValueError: If data or model is unknown, or two grids have a model of the same name on the same data.
    """
    known = models_on_data([read_grid(config) for config in configs])
    for chosen, names in ((data, known), (models, dict.fromkeys(name for own in known.values() for name in own))):
        if unknown := set(chosen or ()) - set(names):
            msg = f"Unknown {', '.join(map(repr, sorted(unknown)))}; choose of {', '.join(map(repr, names))}."
            raise ValueError(msg)
    pictures = []
    for part in data or known:
        analyses = {}
        images = build_datamodule(next(iter(known[part].values())), part).test_data
        for name, grid in known[part].items():
            if name not in (models or known[part]):
                continue
            run = {"data": part, "image_size": grid["image_size"], "model": name, "seed": seed, "commit": commit()}
            try:
                run["epochs"] = epochs_of(grid, part, name)
                model = load_trained(grid, part, name, seed, results)
                analyses[name] = analyse(model, images, grid["image_size"], seed)
                run |= _figures(analyses[name])
            except Exception as error:
                logger.exception("%s on %s failed", name, part)
                run["error"] = f"{type(error).__name__}: {error}"
            append_row(output, COLUMNS, run)
        if analyses:
            pictures.append(draw_histograms(analyses, output.with_name(f"{output.stem}_{part.replace('/', '_')}.png")))
    return pictures


@torch.no_grad()
def analyse(model: AnomalibModule, images: AnomalibDataset, size: int, seed: int = 0) -> Analysis:
    """Compute scores and map values of all test images, feature distances of up to ``IMAGES`` of either kind.

    Args:
        model: Trained model in evaluation mode.
        images: Test images, with masks or without.
        size: Side that the model takes.
        seed: Of the noise.

    Returns:
        What the figures are made of.
    """
    dataset = images.subsample(range(len(images)))
    dataset.augmentations = Resize((size, size), antialias=True)  # as the model does, and the mask too
    scores: dict[bool, list[float]] = {False: [], True: []}
    pixels: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for batch in tqdm(DataLoader(dataset, collate_fn=dataset.collate_fn), desc=model.name, unit="image"):
        answer, label = model(batch.image), bool(batch.gt_label)
        scores[label].append(float(answer.pred_score))
        if batch.gt_mask is not None:
            values, mask = answer.anomaly_map.flatten(), batch.gt_mask.flatten() > 0
            for is_abnormal in (False, True):
                pixels[is_abnormal].append(values[mask == is_abnormal])
    distances = {}
    if has_student(model):
        normal, abnormal = (np.flatnonzero(dataset.samples["label_index"] == label) for label in (0, 1))
        few = [[dataset[i].image[None] for i in own[:: max(1, -(-len(own) // IMAGES))]] for own in (normal, abnormal)]
        distances = feature_distances(model, *few, seed)
    return Analysis(
        np.array(scores[False]),
        np.array(scores[True]),
        *(torch.cat([torch.empty(0), *pixels[label]]).numpy() for label in (False, True)),
        distances,
    )


def _figures(analysis: Analysis) -> dict[str, Any]:
    """Average the values; of features also over scales."""
    figures = {name: float(values.mean()) for name, values in analysis.distances.items() if len(values)}
    for name in {name.rsplit("_", 1)[0] for name in figures}:
        figures[name] = float(np.mean([figures[f"{name}_{s}"] for s in SCALES if f"{name}_{s}" in figures]))
    if len(analysis.abnormal_pixels):
        figures["normal_pixels"] = float(analysis.normal_pixels.mean())
        figures["abnormal_pixels"] = float(analysis.abnormal_pixels.mean())
        figures["pixel_overlap"] = _overlap(analysis.normal_pixels, analysis.abnormal_pixels)
    return {
        "normal_images": len(analysis.normal_scores),
        "abnormal_images": len(analysis.abnormal_scores),
        **{name: f"{value:.4g}" for name, value in figures.items()},
    }


def _overlap(normal: np.ndarray, abnormal: np.ndarray) -> float:
    """Share of two histograms of the same bins that is common to both: 0 apart, 1 the same."""
    edges = np.histogram_bin_edges(np.concatenate([normal, abnormal]), BINS)
    shares = [np.histogram(values, edges)[0] / len(values) for values in (normal, abnormal)]
    return float(np.minimum(*shares).sum())


def analyses_table(path: Path) -> str:
    """Make a Markdown table: means, with standard deviation over seeds; arrows lead from the teacher to the student.

    Args:
        path: CSV that ``run_analyses`` wrote; of rows with the same key the last counts.

    Returns:
        Pair distances of normal images, as squared error and as 1 - cosine; that of abnormal to normal ones, as a
        multiple of the latter; 1 - cosine at noisy positions; the map's mean on normal and abnormal pixels, and the
        share that their histograms have in common.
    """
    rows = pd.DataFrame(read_rows(path, COLUMNS), columns=COLUMNS).drop_duplicates(list(KEY), keep="last")
    rows[list(FIGURES)] = rows[list(FIGURES)].apply(pd.to_numeric)
    for source in ("teacher", "student"):
        rows[f"{source}_ratio"] = rows[f"{source}_abnormal"] / rows[f"{source}_normal"]
    lines = [
        (
            "| data | px | model | seeds | normal pairs: squared error | 1 - cosine | abnormal / normal pairs "
            "| 1 - cosine at noise | map on normal | on abnormal pixels | overlap |"
        ),
        "|" + "---|" * 11,
    ]
    for (data, size, model, _), runs in rows.groupby(["data", "image_size", "model", "epochs"], sort=False):
        good = runs[runs["error"] == ""]
        if good.empty:
            lines.append(f"| {data} | {size} | {model} | 0 ({len(runs)} failed) |" + " - |" * 7)
            continue
        cells = [
            " → ".join(mean_and_spread(good[f"{source}_{name}"], *DIGITS) for source in ("teacher", "student"))
            for name in ("normal_mse", "normal", "ratio", "noise")
        ]
        cells += [
            mean_and_spread(good[name], *DIGITS) for name in ("normal_pixels", "abnormal_pixels", "pixel_overlap")
        ]
        lines.append(f"| {' | '.join([data, size, model, str(len(good)), *cells])} |")
    return "\n".join(lines)
