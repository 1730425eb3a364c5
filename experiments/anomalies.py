"""What AAND's synthesis makes of training images: the images, with an anomaly each, the masks and the foreground.

python -m experiments.anomalies experiments/configs/aand_real.yaml
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from anomalib_rdpp.benchmark.build import build_datamodule, build_model
from anomalib_rdpp.benchmark.cli import run
from anomalib_rdpp.benchmark.gallery import GREY, draw
from anomalib_rdpp.benchmark.grid import read_grid

IMAGES = 6  # in a picture


def draw_anomalies(grids: Sequence[Path], output: Path = Path("results/gallery")) -> list[Path]:
    """Draw synthetic anomalies of the models of grids that have some, whatever their probability.

    Args:
        grids: YAML grids of accuracy.
        output: Folder for a picture per data set and such model.

    Returns:
        The pictures.
    """
    pictures = []
    for grid in map(read_grid, grids):
        for data in grid["data"]:
            dataset = build_datamodule(grid, data).train_data
            for name in grid["models"]:
                model = build_model(grid, name)
                if not hasattr(model, "anomalies"):
                    continue
                torch.manual_seed(0)
                model.anomalies.probability = 1.0
                items = [dataset[i] for i in range(0, len(dataset), max(1, len(dataset) // IMAGES))][:IMAGES]
                images = torch.stack([model.pre_processor.transform(item.image) for item in items])
                blended, masks, foreground = model.anomalies(images, [item.image_path for item in items])
                rows = {"normal": images, "with anomaly": blended, "mask": masks, "foreground": foreground}
                cells = [[(said, one.float().permute(1, 2, 0), GREY) for one in own] for said, own in rows.items()]
                pictures.append(draw(cells, output / f"{data.replace('/', '_')}_{name}_anomalies.png"))
    return pictures


if __name__ == "__main__":
    run("python -m experiments.anomalies", draw_anomalies)
