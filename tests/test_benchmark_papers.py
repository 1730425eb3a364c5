"""The papers' protocols: grids with categories, one model for several, arguments that exist."""

import inspect
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image

from anomalib_rdpp.benchmark.accuracy import accuracy_results, run_accuracy
from anomalib_rdpp.benchmark.filled import random_weights
from anomalib_rdpp.benchmark.grid import epochs_of, read_grid, runs_of

pytestmark = pytest.mark.no_cover  # coverage leaves the benchmark out
ROOT = Path(__file__).parents[1]
PAPERS = sorted((ROOT / "configs/benchmark/papers").glob("*.yaml"))
LATENCY = set((ROOT / "experiments/configs").glob("latency_*.yaml"))  # have other keys
GRIDS = [*PAPERS, *sorted(set((ROOT / "experiments/configs").glob("*.yaml")) - LATENCY)]
TOY = {"class_path": "benchmark_toy.Toy"}
# Per data set: folders of training images, normal and abnormal test images, masks.
LAYOUTS = {
    "mvtecad": ("{}/train/good", "{}/test/good", "{}/test/hole", "{}/ground_truth/hole"),
    "visa": tuple(f"visa_pytorch/{{}}/{part}" for part in ("train/good", "test/good", "test/bad", "ground_truth/bad")),
    "btad": ("{}/train/ok", "{}/test/ok", "{}/test/ko", "{}/ground_truth/ko"),
    "mvtec3d": ("{}/train/good/rgb", "{}/test/good/rgb", "{}/test/hole/rgb", "{}/test/hole/gt"),
    "oct": ("train/NORMAL", "test/NORMAL", "test/CNV", None, "test/DME", "test/DRUSEN"),
}


def draw(root, layout, category):
    """Write two tiny images into each folder of a layout; abnormal ones have a bright square."""
    generator = np.random.default_rng(0)
    for number, folder in enumerate(LAYOUTS[layout]):
        if folder is None:
            continue
        path = root / folder.format(category)
        path.mkdir(parents=True)
        for i in range(2):
            pixels = generator.integers(90, 120, (64, 64, 3), dtype=np.uint8)
            if number == 3:
                pixels = np.zeros((64, 64), np.uint8)
            if number > 1:
                pixels[16:40, 20:44] = 255
            Image.fromarray(pixels).save(path / f"{i:03}.png")
            if path.name == "rgb":
                (path.parent / "xyz").mkdir(exist_ok=True)
                tifffile.imwrite(path.parent / "xyz" / f"{i:03}.tiff", np.zeros((64, 64, 3), np.float32))


def stand_in(config, folder, models):
    """Write the first data of a grid again: tiny images of one or two categories, other models, one epoch."""
    grid = yaml.safe_load(config.read_text())
    name, part = next(iter(grid["data"].items()))
    layout = "mvtecad" if "joined" in part else name
    for key in ("categories", "joined"):
        if key in part:
            part[key] = list(part[key])[: 2 if key == "joined" else 1]
    for category in part.get("categories", part.get("joined", [""])):
        draw(folder / "data", layout, category)
    part |= {"epochs": 1, "init_args": {**part["init_args"], "root": str(folder / "data")}}
    grid |= {"data": {name: part}, "models": models, "image_size": 64, "batch_size": 2}
    path = folder / config.name
    path.write_text(yaml.safe_dump(grid, sort_keys=False))
    return path


def start(config, folder, models):
    run_accuracy([stand_in(config, folder, models)], folder / "rows.csv")
    return accuracy_results(folder / "rows.csv").rows()


@pytest.mark.parametrize("config", GRIDS, ids=lambda path: path.stem)
def test_grid_names_classes_and_arguments_that_there_are(config):
    grid = read_grid(config)
    assert grid["teacher"]
    for part in (*grid["models"].values(), *grid["data"].values()):
        module, _, name = part["class_path"].rpartition(".")
        known = inspect.signature(getattr(import_module(module), name)).parameters
        assert set(part.get("init_args", {})) <= set(known)
    for data, model, _ in runs_of(grid):
        assert epochs_of(grid, data, model) > 0


@pytest.mark.parametrize("config", PAPERS, ids=lambda path: path.stem)
def test_protocol_starts_on_a_stand_in(config, tmp_path):
    rows = start(config, tmp_path, {"RD++": TOY})
    assert [row["error"] for row in rows] == [""] * len(rows)
    assert all(row["image_AUROC"] for row in rows)
    assert all(bool(row["pixel_AUPRO"]) == (config.stem != "oct") for row in rows)
    if config.stem == "mvtecad_one_model":  # trained on the images of two categories, tested on each
        assert [row["data"] for row in rows] == ["one model, 100 epochs/carpet", "one model, 100 epochs/grid"]
        assert {(row["train_images"], row["test_images"]) for row in rows} == {("4", "4")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RD", "RD++", "AAND", "PatchCore", "CFA"])
def test_model_of_the_protocols_starts_on_a_stand_in(name, tmp_path):
    own = read_grid(PAPERS[0])["models"][name]
    kept = {key: value for key, value in own.get("init_args", {}).items() if key != "texture_dir"}
    with random_weights():
        (row,) = start(PAPERS[0], tmp_path, {name: {**own, "epochs": 1, "init_args": {**kept, "backbone": "resnet18"}}})
    assert row["error"] == ""
