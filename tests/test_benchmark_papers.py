"""The papers' protocols: grids with categories, one model for several, published figures beside ours, rankings."""

import inspect
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image

from anomalib_rdpp.benchmark.accuracy import COLUMNS, run_accuracy, runs_of
from anomalib_rdpp.benchmark.grid import epochs_of, read_grid
from anomalib_rdpp.benchmark.latency import _random_extractor
from anomalib_rdpp.benchmark.ranking import draw_accuracy, published_table, ranking_tables
from anomalib_rdpp.benchmark.rows import append_row, read_rows

GRIDS = sorted((Path(__file__).parents[1] / "configs/benchmark").glob("**/*.yaml"))
GRIDS = [path for path in GRIDS if not path.stem.startswith("latency") and path.parent.name != "models"]
PAPERS = sorted((Path(__file__).parents[1] / "configs/benchmark/papers").glob("*.yaml"))
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
    """Write the first data of a grid again: tiny images of one or two categories, random ResNet-18s, one epoch."""
    grid = yaml.safe_load(config.read_text())
    known = read_grid(config)["models"]
    grid["models"] = {}
    for name in models:
        own = known[name]
        random = {"pre_trained": False} if "Cfa" not in own["class_path"] else {}
        kept = {key: value for key, value in own.get("init_args", {}).items() if key != "texture_dir"}
        init_args = {**kept, "backbone": "resnet18", **random}
        grid["models"][name] = {**own, "epochs": 1, "init_args": init_args}
    name, part = next(iter(grid["data"].items()))
    layout = "mvtecad" if "joined" in part else name
    for key in ("categories", "joined"):
        if key in part:
            part[key] = list(part[key])[: 2 if key == "joined" else 1]
    for category in part.get("categories", part.get("joined", [""])):
        draw(folder / "data", layout, category)
    part |= {"epochs": 1, "init_args": {**part["init_args"], "root": str(folder / "data")}}
    path = folder / config.name
    path.write_text(yaml.safe_dump({**grid, "data": {name: part}, "image_size": 64, "batch_size": 2}, sort_keys=False))
    return path


def start(config, folder, models):
    path = stand_in(config, folder, models)
    with mock.patch("anomalib.models.image.cfa.torch_model.get_feature_extractor", _random_extractor):
        run_accuracy(path, folder / "rows.csv")
    return read_rows(folder / "rows.csv", COLUMNS)


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
    rows = start(config, tmp_path, ["RD++"])
    assert [row["error"] for row in rows] == [""] * len(rows)
    assert all(row["image_AUROC"] for row in rows)
    assert all(bool(row["pixel_AUPRO"]) == (config.stem != "oct") for row in rows)
    if config.stem == "mvtecad_one_model":  # trained on the images of two categories, tested on each
        assert [row["data"] for row in rows] == ["one model, 100 epochs/carpet", "one model, 100 epochs/grid"]
        assert {(row["train_images"], row["test_images"]) for row in rows} == {("4", "4")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [path for path in PAPERS if "one_model" not in path.stem], ids=lambda path: path.stem
)
def test_all_models_of_a_protocol_start_on_a_stand_in(config, tmp_path):
    rows = start(config, tmp_path, ["RD", "AAND", "PatchCore", "CFA"])
    assert [(row["model"], row["error"]) for row in rows] == [(name, "") for name in ("RD", "AAND", "PatchCore", "CFA")]


@pytest.mark.parametrize("config", PAPERS, ids=lambda path: path.stem)
def test_published_figures_belong_to_runs_of_their_grid(config, tmp_path):
    (tmp_path / "rows.csv").write_text(",".join(COLUMNS) + "\n")
    lines = published_table(tmp_path / "rows.csv", config).splitlines()
    assert len(lines) == 4 + len(read_grid(config)["published"])
    assert all("not run" in line for line in lines[4:])


def results(path, figures, **facts):
    """Write rows of a CSV: image AUROC by data and model."""
    for (data, model), values in figures.items():
        for seed, value in enumerate(values):
            row = {"data": data, "model": model, "seed": seed, "epochs": 1, "image_size": 64, "batch_size": 2}
            append_row(path, COLUMNS, {**row, "protocol": "last", "image_AUROC": value, **facts})


def test_ranking_has_mean_and_rank_of_the_data_that_all_models_have(tmp_path):
    path = tmp_path / "rows.csv"
    results(
        path,
        {("a", "one"): [0.9, 0.8], ("a", "two"): [0.7], ("b", "one"): [0.5], ("b", "two"): [0.6], ("c", "one"): [0.1]},
    )
    lines = ranking_tables(path).splitlines()
    assert lines[2:] == [
        "| data | one | two |",
        "|---|---|---|",
        "| a | **85.0 ± 7.1** | 70.0 |",
        "| b | 50.0 | **60.0** |",
        "| c | **10.0** | - |",
        "| mean of 2 | 67.5 | 65.0 |",
        "| mean rank | 1.5 | 1.5 |",
    ]
    assert [picture.name for picture in draw_accuracy(path, tmp_path)] == ["accuracy_64_2_last.png"]


def test_protocols_are_not_ranked_together(tmp_path):
    path = tmp_path / "rows.csv"
    results(path, {("a", "one"): [0.9], ("b", "one"): [0.9]})
    results(path, {("a", "two"): [0.8], ("b", "two"): [0.8]}, protocol="best on test")
    assert ranking_tables(path) == ""
    assert [picture.name for picture in draw_accuracy(path, tmp_path)] == [
        "accuracy_64_2_last.png",
        "accuracy_64_2_best_on_test.png",
    ]


def test_published_figures_stand_beside_ours(tmp_path):
    data = {"epochs": 1, "class_path": "anomalib.data.MVTecAD", "categories": ["x", "y"]}
    published = [
        {"data": "set", "model": "one", "image_AUROC": 80.0, "source": "paper"},
        {"data": "set", "model": "two", "image_AUROC": 99.0, "source": "paper"},
        {"data": "set/x", "model": "two", "over": "one", "image_AUROC": 1.0, "source": "others"},
    ]
    grid = {"seeds": [0], "image_size": 64, "batch_size": 2, "models": {"one": {}, "two": {}}, "data": {"set": data}}
    config, path = tmp_path / "grid.yaml", tmp_path / "rows.csv"
    config.write_text(yaml.safe_dump({**grid, "published": published}))
    results(path, {("set/x", "one"): [0.9], ("set/y", "one"): [0.8], ("set/x", "two"): [0.95]})
    lines = published_table(path, config).splitlines()[4:]
    assert [line.split(" | ")[4] for line in lines] == [
        "85.0, 80.0 (+5.0)",
        "95.0 of 1 of 2, 99.0",
        "+5.0, +1.0 (+4.0)",
    ]
    config.write_text(yaml.safe_dump({**grid, "published": [{**published[0], "model": "three"}]}))
    with pytest.raises(ValueError, match="published figures of three on set, but no such runs"):
        published_table(path, config)
