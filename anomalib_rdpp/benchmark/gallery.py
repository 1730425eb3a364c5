"""Heat maps of the models of an accuracy grid, side by side."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import resize

from .build import build_datamodule, load_trained
from .grid import models_on_data, read_grid

GREY = {"cmap": "gray", "vmin": 0, "vmax": 1}


@torch.no_grad()
def run_gallery(
    grids: Sequence[Path], results: Path = Path("results"), output: Path = Path("results/gallery"), seed: int = 0
) -> list[Path]:
    """Draw heat maps of an accuracy grid's models side by side.

    Args:
        grids: YAML grids that ``accuracy`` was given; each on its own data.
        results: Folder of its CSV, where the checkpoints are.
        output: Folder for a picture per data set.
        seed: Of the runs to draw.

    Returns:
        The pictures: image, truth and the map of each model. Rows are chosen by the scores of the last model. Each
        model has a colour scale of its own, from the median of its maps to their 99.9th percentile.

    Raises:
        ValueError: If two grids have a model of one name on the same data, or a test set has one kind of images.
    """
    on_data = models_on_data([read_grid(path) for path in grids])
    return [_draw_maps(models, data, results, output, seed) for data, models in on_data.items()]


def _draw_maps(models: dict[str, dict[str, Any]], data: str, results: Path, output: Path, seed: int) -> Path:
    """Draw a row per chosen image."""
    dataset = build_datamodule(next(iter(models.values())), data).test_data
    batches = list(DataLoader(dataset, collate_fn=dataset.collate_fn))  # one by one: sizes may differ
    is_defect = np.array([bool(batch.gt_label) for batch in batches])
    if is_defect.all() or not is_defect.any():
        kind = "defects" if is_defect.all() else "normal"
        msg = (
            f"A gallery needs both kinds, but all {len(batches)} test images of {data} are {kind}: add the other kind."
        )
        raise ValueError(msg)
    maps, scores = {}, {}
    for name, grid in models.items():
        model = load_trained(grid, data, name, seed, results)
        answers = [model(batch.image) for batch in batches]
        maps[name] = [answer.anomaly_map.squeeze().numpy() for answer in answers]
        scores[name] = np.array([float(answer.pred_score) for answer in answers])
    ranges = {name: np.percentile(own, (50, 99.9)) for name, own in maps.items()}
    rows = []
    for label, index in _choose(scores[name], is_defect).items():
        size, mask = list(maps[name][index].shape), batches[index].gt_mask
        image = resize(batches[index].image[0], size).permute(1, 2, 0).clamp(0, 1)
        truth = torch.zeros(size) if mask is None else resize(mask.float()[None], size).squeeze()
        rows.append([(label, image, {}), ("truth", truth, GREY)])
        for model, (low, high) in ranges.items():
            options = {"cmap": "inferno", "vmin": low, "vmax": high}
            rows[-1].append((f"{model}: {scores[model][index]:.2f}", maps[model][index], options))
    return draw(rows, output / f"{data.replace('/', '_')}.png")


def _choose(scores: np.ndarray, is_defect: np.ndarray) -> dict[str, int]:
    """Indices of the images to draw, by what they show."""
    defects, normal = np.flatnonzero(is_defect), np.flatnonzero(~is_defect)
    defects = defects[np.argsort(scores[defects])]
    labels = ("clearest defect", "upper quarter", "median defect", "lower quarter", "least clear defect")
    chosen = defects[np.linspace(len(defects) - 1, 0, len(labels)).round().astype(int)]
    return {**dict(zip(labels, chosen, strict=True)), "highest normal": normal[np.argmax(scores[normal])]}


def draw(rows: list[list[tuple[str, Any, dict[str, Any]]]], path: Path) -> Path:
    """Draw rows of titles, pixels and how to show them."""
    size = 2 * len(rows[0]), 2.2 * len(rows)
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, pixels, options) in zip(axes.flat, chain(*rows), strict=True):
        axis.imshow(pixels, **options)
        axis.set_title(title, fontsize=9)
        axis.set(xticks=[], yticks=[])  # the frame stays: a mask may be all white
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path
