"""Heat maps of the models of an accuracy grid, side by side, and the synthetic anomalies that they learn from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import resize

from .grid import build_datamodule, build_model, load_trained, models_on_data, read_grid


@torch.no_grad()
def draw_gallery(configs: Sequence[Path], results: Path, output: Path, seed: int = 0) -> list[Path]:
    """Draw image, truth and the map of each model: best, median and worst defects, and the worst normal image.

    Args:
        configs: Grids that ``run_accuracy`` was given; each on its own data.
        results: Folder of its CSV, where the checkpoints are.
        output: Folder for a picture per data set.
        seed: Of the runs.

    Returns:
        The pictures. Rows are chosen by the scores of the last model. Each model has a colour scale of its own, from
        the median of its maps to their 99.9th percentile.

    Raises:
        FileNotFoundError: If a run's checkpoint isn't there.
        ValueError: If two grids have a model of the same name on the same data, or a test set has but one kind of
            images.
    """
    known = models_on_data([read_grid(config) for config in configs])
    output.mkdir(parents=True, exist_ok=True)
    pictures = []
    for data, models in known.items():
        dataset = build_datamodule(next(iter(models.values())), data).test_data
        batches = list(DataLoader(dataset, collate_fn=dataset.collate_fn))  # one by one: sizes may differ
        maps, scores = {}, {}
        is_defect = np.array([bool(batch.gt_label) for batch in batches])
        if is_defect.all() or not is_defect.any():
            msg = (
                f"The gallery shows defects beside a normal image, but all {len(batches)} test images of {data} are "
                f"{'defects' if is_defect.all() else 'normal'}: add the other kind."
            )
            raise ValueError(msg)
        for name, grid in models.items():
            model = load_trained(grid, data, name, seed, results)
            answers = [model(batch.image) for batch in batches]
            maps[name] = [answer.anomaly_map.squeeze().numpy() for answer in answers]
            scores[name] = np.array([float(answer.pred_score) for answer in answers])
        chosen = _choose(scores[name], is_defect)
        pictures.append(_draw(batches, maps, scores, chosen, output / f"{data.replace('/', '_')}.png"))
    return pictures


def draw_anomalies(config: Path, output: Path, count: int = 6) -> list[Path]:
    """Draw training images, what AAND's synthesis makes of them, the masks and the foreground.

    Args:
        config: Grid with a model that has ``anomalies``.
        output: Folder for a picture per data set and such model.
        count: Images in each.

    Returns:
        The pictures; every image gets an anomaly here, whatever the model's probability.
    """
    grid = read_grid(config)
    output.mkdir(parents=True, exist_ok=True)
    pictures = []
    for data in grid["data"]:
        dataset = build_datamodule(grid, data).train_data
        for name in grid["models"]:
            model = build_model(grid, name)
            if not hasattr(model, "anomalies"):
                continue
            torch.manual_seed(0)
            model.anomalies.probability = 1.0
            items = [dataset[i] for i in range(0, len(dataset), max(1, len(dataset) // count))][:count]
            images = torch.stack([model.pre_processor.transform(item.image) for item in items])
            blended, masks, foreground = model.anomalies(images, [item.image_path for item in items])
            figure, axes = plt.subplots(
                4, len(items), figsize=(2 * len(items), 8.6), squeeze=False, layout="constrained"
            )
            rows = {"normal": images, "with anomaly": blended, "mask": masks, "foreground": foreground}
            for row, (label, pixels) in zip(axes, rows.items(), strict=True):
                row[0].set_title(label, fontsize=9, loc="left")
                for axis, one in zip(row, pixels, strict=True):
                    axis.imshow(one.float().permute(1, 2, 0), cmap="gray", vmin=0, vmax=1)
                    axis.set(xticks=[], yticks=[])  # the frame stays: a foreground may be all white
            pictures.append(output / f"{data.replace('/', '_')}_{name}_anomalies.png")
            figure.savefig(pictures[-1], dpi=90)
            plt.close(figure)
    return pictures


def _choose(scores: np.ndarray, is_defect: np.ndarray) -> dict[str, int]:
    """Indices of the images to draw, by what they show."""
    defects = np.flatnonzero(is_defect)
    defects = defects[np.argsort(scores[defects])]
    normal = np.flatnonzero(~is_defect)
    return {
        "clearest defect": defects[-1],
        "upper quarter": defects[len(defects) * 3 // 4],
        "median defect": defects[len(defects) // 2],
        "lower quarter": defects[len(defects) // 4],
        "least clear defect": defects[0],
        "highest normal": normal[np.argmax(scores[normal])],
    }


def _draw(
    batches: list[Any],
    maps: dict[str, list[np.ndarray]],
    scores: dict[str, np.ndarray],
    chosen: dict[str, int],
    path: Path,
) -> Path:
    """Draw a row per image."""
    ranges = {name: np.percentile(own, (50, 99.9)) for name, own in maps.items()}
    figure, axes = plt.subplots(
        len(chosen), len(maps) + 2, figsize=(2 * (len(maps) + 2), 2.2 * len(chosen)), layout="constrained"
    )
    for row, (label, index) in zip(axes, chosen.items(), strict=True):
        size = list(next(iter(maps.values()))[index].shape)
        row[0].imshow(resize(batches[index].image[0], size).permute(1, 2, 0).clamp(0, 1))
        row[0].set_title(label, fontsize=9)
        mask = batches[index].gt_mask
        truth = torch.zeros(size) if mask is None else resize(mask.float()[None], size).squeeze()
        row[1].imshow(truth, cmap="gray", vmin=0, vmax=1)
        row[1].set_title("truth", fontsize=9)
        for axis, name in zip(row[2:], maps, strict=True):
            axis.imshow(maps[name][index], cmap="inferno", vmin=ranges[name][0], vmax=ranges[name][1])
            axis.set_title(f"{name}: {scores[name][index]:.2f}", fontsize=9)
        for axis in row:
            axis.set_axis_off()
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path
