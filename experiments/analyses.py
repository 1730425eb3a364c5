"""The papers' analyses of trained models: what the student sees, and how well the map tells normal from abnormal.

python -m experiments.analyses experiments/configs/rdpp_real.yaml experiments/configs/aand_real.yaml --seed 1 --data mtd

*Compactness*: how far normal test images are from each other in the features that the student sees: the teacher's for
RD, projected for RD++, amplified for AAND. *Suppression*: the same from each abnormal image to every normal one, and
how far features move where noise is put on a normal image. *Discrepancy*: the map on normal and on abnormal pixels.

Source: Tien et al., CVPR 2023, section 4 (compactness, suppression); Tang et al., IEEE TIP 2026 (score histograms).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data.datasets import AnomalibDataset
from anomalib.models import AnomalibModule
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Resize
from tqdm import tqdm

from anomalib_rdpp.benchmark.build import build_datamodule, load_trained
from anomalib_rdpp.benchmark.cli import run
from anomalib_rdpp.benchmark.grid import epochs_of, models_on_data, read_grid, refuse_unknown
from anomalib_rdpp.benchmark.report import mean_and_spread
from anomalib_rdpp.benchmark.results import Results, commit, markdown

from .features import SCALES, feature_distances, has_student
from .histograms import BINS, Analysis, draw_histograms

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
analyses_results = partial(Results, "experiments.analyses", COLUMNS, KEY, FIGURES)
FEATURES = {
    "normal pairs: squared error": "normal_mse",
    "1 - cosine": "normal",
    "abnormal / normal pairs": "ratio",
    "1 - cosine at noise": "noise",
}
PIXELS = {"map on normal": "normal_pixels", "on abnormal pixels": "abnormal_pixels", "overlap": "pixel_overlap"}
DIGITS = (".3g", ".1g")  # of a mean, of its spread
IMAGES = 40  # normal and abnormal ones whose features are compared, evenly picked: 780 and 1600 pairs


def run_analyses(
    grids: Sequence[Path],
    results: Path = Path("results"),
    output: Path = Path("results/analyses.csv"),
    seed: int = 0,
    data: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
) -> list[Any]:
    """Analyse what a grid's trained models do to features, scores and maps.

    Args:
        grids: YAML grids that ``accuracy`` was given; each on its own data.
        results: Folder of its CSV, where the checkpoints are.
        output: CSV file, appended to; pictures go beside it. A model that fails becomes a row with its error.
        seed: Of the runs, and of the noise.
        data: Names of the grids' data, all by default.
        models: Names of the grids' models, all by default.

    Returns:
        A table and the pictures, one per data set.

    Raises:
        ValueError: If data or model is unknown, or two grids have a model of the same name on the same data.
    """
    known, rows, pictures = models_on_data([read_grid(path) for path in grids]), analyses_results(output), []
    refuse_unknown(data, known)
    refuse_unknown(models, dict.fromkeys(name for own in known.values() for name in own))
    for part in data or known:
        analyses = {}
        images = build_datamodule(next(iter(known[part].values())), part).test_data
        for name, grid in known[part].items():
            if name not in (models or known[part]):
                continue
            row = {"data": part, "image_size": grid["image_size"], "model": name, "seed": seed, "commit": commit()}
            row["epochs"] = epochs_of(grid, part, name)
            with rows.run(row):
                model = load_trained(grid, part, name, seed, results)
                analyses[name] = analyse(model, images, grid["image_size"], seed)
                rows.append({**row, **_figures(analyses[name])})
        if analyses:
            pictures.append(draw_histograms(analyses, output.with_name(f"{output.stem}_{part.replace('/', '_')}.png")))
    return [analyses_table(rows), "", *pictures]


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


def analyses_table(results: Results) -> str:
    """Make a Markdown table: means, with standard deviation over seeds; arrows lead from the teacher to the student.

    Pair distances of normal images, as squared error and as 1 - cosine; that of abnormal to normal ones, as a multiple
    of the latter; 1 - cosine at noisy positions; the map's mean on normal and abnormal pixels, and the share that their
    histograms have in common.
    """
    rows, lines = results.frame(), []
    for source in ("teacher", "student"):
        rows[f"{source}_ratio"] = rows[f"{source}_abnormal"] / rows[f"{source}_normal"]
    for (data, size, model, _), runs in rows.groupby(["data", "image_size", "model", "epochs"], sort=False):
        good = runs[runs["error"] == ""]
        failed = f" ({len(runs) - len(good)} failed)" if len(good) < len(runs) else ""
        line = {"data": data, "px": size, "model": model, "seeds": f"{len(good)}{failed}"}
        for head, name in FEATURES.items():
            each = [mean_and_spread(good[f"{source}_{name}"], *DIGITS) for source in ("teacher", "student")]
            line[head] = " → ".join(each)
        lines.append(line | {head: mean_and_spread(good[name], *DIGITS) for head, name in PIXELS.items()})
    return markdown(lines)


if __name__ == "__main__":
    run("python -m experiments.analyses", run_analyses)
