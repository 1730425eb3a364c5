"""One-class novelty detection: a data set of torchvision as class folders, and the table of the ten classes.

python -m experiments.oneclass images CIFAR10 ../cifar10
python -m experiments.oneclass table experiments/results/oneclass.csv

Images go to ``FOLDER/train/<class>/00000.png`` and ``FOLDER/test/<class>/00000.png``; torchvision downloads them first.
"""

import tempfile
from pathlib import Path
from typing import Literal

from torchvision import datasets
from tqdm import tqdm

from anomalib_rdpp.benchmark.cli import run
from anomalib_rdpp.benchmark.results import markdown

from .curves import curves_results


def write_folders(dataset: Literal["CIFAR10", "FashionMNIST", "MNIST"], folder: Path) -> list[str]:
    """Write a data set of torchvision as class folders.

    Args:
        dataset: torchvision's name of it.
        folder: Folder for the images; must not exist yet.

    Returns:
        Where the images are.

    Raises:
        FileExistsError: If the folder exists.
    """
    if folder.exists():
        msg = f"'{folder}' exists already: give a folder that doesn't, or remove it."
        raise FileExistsError(msg)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        for part in ("train", "test"):
            images = getattr(datasets, dataset)(Path(unfinished) / "download", train=part == "train", download=True)
            names = [name.split(" - ")[0].replace("/", "-") for name in images.classes]  # "0 - zero", "T-shirt/top"
            for number, (image, label) in enumerate(tqdm(images, desc=part)):
                path = Path(unfinished) / "images" / part / names[label] / f"{number:05}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.convert("RGB").save(path)
        (Path(unfinished) / "images").rename(folder)
    return [f"Images of {len(names)} classes in '{folder}'."]


def class_table(rows: Path) -> str:
    """Print image AUROC in percent of each class and their mean, by the model's own score and by the map's sum.

    Args:
        rows: CSV file of experiments.curves.

    Returns:
        A Markdown table, a line for each model, size, seed, number of steps and score.
    """
    frame = curves_results(rows).frame()
    frame = frame[frame["error"] == ""]
    scores = {"its own": "image_AUROC", "sum": "AUROC_sum"}
    lines = []
    for (model, size, seed, steps), own in frame.groupby(["model", "image_size", "seed", "steps"], sort=False):
        for score, metric in scores.items():
            classes = own.set_index("data")[metric] * 100
            line = {"model": model, "px": str(size), "seed": str(seed), "steps": str(steps), "score": score}
            line |= {name.rpartition("/")[2]: f"{value:.1f}" for name, value in classes.items()}
            lines.append({**line, "mean": f"{classes.mean():.2f}", "CPU min": f"{own['fit_minutes'].mean():.1f}"})
    return markdown(lines)


if __name__ == "__main__":
    run("python -m experiments.oneclass", {"images": write_folders, "table": class_table})
