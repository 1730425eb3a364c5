"""The lab runs: curves, analyses, steps, profile, recipes of INT8, tables and pictures of many data sets."""

import re
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
import yaml
from openvino import opset13 as ops
from PIL import Image
from tiny import TINY, build, engine

from anomalib_rdpp import RDPP
from anomalib_rdpp.benchmark.accuracy import accuracy_results, run_accuracy
from anomalib_rdpp.benchmark.build import load_trained
from anomalib_rdpp.benchmark.grid import read_grid
from anomalib_rdpp.benchmark.latency import latency_results
from anomalib_rdpp.benchmark.precision import precision_results
from anomalib_rdpp.benchmark.report import read_accuracy
from experiments import analyses, chart, curves, gpu, ideas, int8_recipes, larger, oneclass, papers, transport
from experiments.anomalies import draw_anomalies
from experiments.profile import layer_table
from experiments.steps import run_steps, steps_results

pytestmark = pytest.mark.no_cover  # the lab is not in the package
ROOT = Path(__file__).parents[1]
PAPERS = sorted((ROOT / "configs/benchmark/papers").glob("*.yaml"))
TOY = {"class_path": "benchmark_toy.Toy"}
RANDOM = {"init_args": {"backbone": "resnet18", "pre_trained": False}}


@pytest.fixture
def grid(tiny_folder, tmp_path):
    """Write a grid of models on the tiny images, two of the six training images, and say where."""

    def write(models, **keys):
        folders = {"normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/square"}
        init_args = {"name": "tiny", "root": str(tiny_folder), **folders, "mask_dir": "ground_truth/square"}
        data = {"class_path": "anomalib.data.Folder", "epochs": 2, "train_every": 3, "init_args": init_args}
        content = {"seeds": [0], "image_size": 64, "batch_size": 2, "models": models, "data": {"tiny": data}, **keys}
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "grid.yaml", tmp_path / "rows.csv"

    return write


def cells(table):
    """Take the padding out of a Markdown table."""
    return [" ".join(line.split()) for line in table.splitlines()]


def test_curves_have_a_row_per_test_and_a_bar_and_are_drawn(grid, tmp_path, capsys):
    average = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.5}}
    broken = {"class_path": "anomalib.models.Nothing"}
    models = {"ours": TOY, "another": broken, "averaged": {**TOY, "callbacks": [average]}}
    config, output = grid(models, every=4)
    with pytest.raises(ValueError, match="needs `every`, the epochs from test to test, which divides"):
        curves.run_curves([config], output)
    config, output = grid(models, every=1)
    table, _, picture = curves.run_curves([config], output, tmp_path / "pictures")
    assert "ours on tiny: 100%" in capsys.readouterr().err
    rows = curves.curves_results(output).rows()
    known = [(row["model"], row["epoch"]) for row in rows if not row["error"]]
    assert known == [(model, epoch) for model in ("averaged", "ours") for epoch in "12"]
    assert [row["model"] for row in rows if row["error"]] == ["another"]
    minutes = [float(row["fit_minutes"]) for row in rows if row["model"] == "ours"]
    assert 0 <= minutes[0] <= minutes[1]
    curves.run_curves([config], output, tmp_path / "pictures")
    assert len([row for row in curves.curves_results(output).rows() if not row["error"]]) == 4, "not run again"
    assert any(line.startswith("| tiny | averaged | 1 | 2 |") for line in cells(table))
    assert picture.name == "curves_tiny_64px.png"
    assert all(0 <= float(row[name]) <= 1 for row in rows if not row["error"] for name in curves.TOPS)
    assert load_trained(read_grid(config), "tiny", "ours", 0, tmp_path / "curves"), "the trained models stay"


@pytest.mark.slow  # each process imports all anew
def test_curves_of_several_processes_are_those_of_one(grid, tmp_path):
    config, output = grid({"ours": {**TOY, "every": 2}, "broken": {"class_path": "anomalib.models.Nothing"}}, every=1)
    found = {}
    for processes in (1, 2):
        curves.run_curves([config], output.with_stem(f"rows{processes}"), tmp_path, processes)
        rows = curves.curves_results(output.with_stem(f"rows{processes}")).rows()
        assert sorted(row["epoch"] for row in rows) == ["0", "2"], "an error, and one test"
        found[processes] = [{**row, "fit_minutes": ""} for row in rows if not row["error"]]
    assert found[1] == found[2]


@pytest.mark.parametrize("score", ["coarse", "standardised"])
def test_ideas_are_rows_each_once(score, grid):
    arguments = {**TINY, "projection": False, "recipe": "fast", "student": "cascade", "score": score}
    config, output = grid({"ours": {"class_path": "anomalib_rdpp.RDPP", "init_args": arguments}}, seeds=[0, 1])
    for _ in range(2):
        table = ideas.run_ideas([config], output, seeds=[1], steps=2)
    rows = ideas.ideas_results(output).rows()
    assert [(row["idea"], row["seed"], row["error"]) for row in rows] == [(idea, "1", "") for idea in ideas.IDEAS]
    assert len({row["AUROC_all"] + row["AUPRO"] for row in rows}) > 1
    assert all(row["by_kind"].startswith("square ") for row in rows)
    assert all(bool(row["AUROC_standardised"]) == (score == "standardised") for row in rows)
    assert len(cells(table)) == 2 + len(ideas.IDEAS)
    fast, paper = {"recipe": "fast"}, {"projection": False, "recipe": "paper"}
    for name, others in (("RDPP", fast | {"projection": True}), ("RDPP", paper), ("AAND", fast)):
        other = {"class_path": f"anomalib_rdpp.{name}", "init_args": {**TINY, **others}}
        with pytest.raises(ValueError, match="Ideas are for light students without projection, but ours is no such"):
            ideas.run_ideas([grid({"ours": other})[0]], output)


def test_times_of_steps(tmp_path):
    table = gpu.run_gpu(tmp_path / "gpu.csv", ["test_resnet"], ["32-true"], ["AAND, stage one", "RD"], 32, 2, windows=1)
    rows = gpu.gpu_results(tmp_path / "gpu.csv").rows()
    assert [row["model"] for row in rows if not row["error"] and float(row["median_ms"]) > 0] == [
        "AAND, stage one",
        "RD",
    ]
    assert len(cells(table)) == 4


def test_one_class_data_and_table(tmp_path, monkeypatch):
    class Images(list):
        classes = ("T-shirt/top", "1 - one")

        def __init__(self, *_, **__):
            super().__init__((Image.new("L", (28, 28)), label) for label in (0, 1, 1))

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", Images)
    assert oneclass.write_folders("FashionMNIST", tmp_path / "images") == [
        f"Images of 2 classes in '{tmp_path}/images'."
    ]
    found = [str(path.relative_to(tmp_path / "images")) for path in sorted(tmp_path.rglob("*.png"))]
    assert found[:3] == ["test/1/00001.png", "test/1/00002.png", "test/T-shirt-top/00000.png"]
    with pytest.raises(FileExistsError, match="exists already"):
        oneclass.write_folders("FashionMNIST", tmp_path / "images")
    row = dict.fromkeys(curves.COLUMNS, "") | {"model": "RD", "seed": 0, "epoch": 1, "steps": 100}
    row |= {"image_size": 64, "fit_minutes": 1}
    results = curves.curves_results(tmp_path / "rows.csv")
    for name, value in (("cifar10/cat", 0.8), ("cifar10/dog", 0.9)):
        results.append({**row, "data": name, "image_AUROC": value, "AUROC_sum": value + 0.05})
    assert cells(oneclass.class_table(tmp_path / "rows.csv"))[2:] == [
        "| RD | 64 | 0 | 100 | its own | 80.0 | 90.0 | 85.00 | 1.0 |",
        "| RD | 64 | 0 | 100 | sum | 85.0 | 95.0 | 90.00 | 1.0 |",
    ]


def test_stored_rows_of_experiments_are_read():
    of_curves = dict.fromkeys(
        (
            "curves",
            "fast_recipe",
            "fast_light",
            "long",
            "oneclass",
            "cascade",
            "gpu_long",
            "gpu_ablation",
            "gpu_fast_200",
            "gpu_fast_800",
            "gpu_cascade",
            "transport_curves",
            "cascade_again",
            "standardised",
        ),
        curves.curves_results,
    )
    stored = {
        **of_curves,
        "transport": transport.transport_results,
        "ideas": ideas.ideas_results,
        "steps": steps_results,
        "gpu_steps": gpu.gpu_results,
        "analyses": analyses.analyses_results,
    }
    for name, opened in stored.items():
        assert len(opened(ROOT / f"experiments/results/{name}.csv").frame()) > 2, name


def test_analyses_of_models(grid, tiny_data):
    tiny_data.setup()
    images = tiny_data.test_data
    ours = RDPP("resnet18", pre_trained=False, pre_processor=RDPP.configure_pre_processor((64, 64))).eval()
    found = analyses._figures(analyses.analyse(ours, images, 64))
    for name in ("normal", "normal_mse", "abnormal", "noise"):
        assert found[f"teacher_{name}"] != found[f"student_{name}"]
    assert 0 <= float(found["pixel_overlap"]) <= 1
    config, output = grid({"toy": TOY, "untrained": {"class_path": "anomalib_rdpp.AAND", **RANDOM}})
    content = yaml.safe_load(config.read_text())
    trained = config.with_name("trained.yaml")
    trained.write_text(yaml.safe_dump({**content, "models": {"toy": TOY}}))
    run_accuracy([trained], output)
    table, _, picture = analyses.run_analyses([config], output.parent, output.with_name("analyses.csv"))
    rows = {row["model"]: row for row in analyses.analyses_results(output.with_name("analyses.csv")).rows()}
    assert "No trained model" in rows["untrained"]["error"]
    assert rows["toy"]["student_normal"] == "", "it has no student"
    assert float(rows["toy"]["normal_pixels"]) > 0
    assert any(line.startswith("| tiny | 64 | toy | 1 |") for line in cells(table))
    assert picture.is_file()


def test_synthetic_anomalies_are_drawn(grid, tmp_path):
    config, _ = grid({"AAND": {"class_path": "anomalib_rdpp.AAND", **RANDOM}, "toy": TOY})
    (picture,) = draw_anomalies([config], tmp_path)
    assert picture.name == "tiny_AAND_anomalies.png"
    assert picture.is_file()


def test_recipes_of_int8_are_rows_beside_those_of_precision(grid, tmp_path):
    config, output = grid({"toy": TOY})
    run_accuracy([config], output)
    path = tmp_path / "precision.csv"
    int8_recipes.run_recipes(config, output.parent, path, recipes=["int8, map too"])
    assert [(row["precision"], row["error"]) for row in precision_results(path).rows()] == [("int8, map too", "")]
    with pytest.raises(ValueError, match=r"Unknown 'int4'; choose of \"int8, NNCF's ranges\""):
        int8_recipes.run_recipes(config, output.parent, path, recipes=["int4"])


def test_steps_of_both_ways_are_timed(tmp_path):
    table = run_steps(tmp_path / "steps.csv", size=64, batch=2, rounds=1)
    assert "| transport " in table
    rows = steps_results(tmp_path / "steps.csv").rows()
    assert {row["way"] for row in rows} == {"ours", "published"}
    assert all(float(row["median_ms"]) > 0 for row in rows)


def test_profile_says_where_the_time_goes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No model at '.*none.xml': give the .xml"):
        layer_table(tmp_path / "none.xml")
    images = ops.parameter([1, 3, 64, 64], np.float32)
    layer = ops.convolution(images, np.ones((4, 3, 3, 3), np.float32), [2, 2], [0, 0], [0, 0], [1, 1])
    ov.save_model(ov.Model([layer], [images]), tmp_path / "model.xml")
    table = layer_table(tmp_path / "model.xml", size=64, rounds=2)
    assert "GMAC of convolutions" in table
    assert all(line.rstrip(" |")[-1].isdigit() for line in table.splitlines() if line.startswith("| Convolution"))


def test_transport_probe_notes_its_rows_and_leaves_training_as_it_is(make_tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    path, states = tmp_path / "probe.csv", []
    for callbacks in ([], [transport.TransportProbe(str(path), every=2)]):
        torch.manual_seed(3)
        model = build("RDPP", projection="light")
        engine(tmp_path, *callbacks).fit(model, datamodule=make_tiny_data())
        states.append(model.model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=0, msg=name)
    rows = transport.transport_results(path).frame()
    assert list(rows["steps"]) == [0, 2]
    assert (rows[["gradient_distillation", "gradient_transport", *transport.SPREADS]] > 0).all(axis=None)
    tested = dict.fromkeys(curves.COLUMNS, "") | {"data": "tiny", "model": "RD++, transport_weight 0", "seed": 7}
    tested |= {"epoch": 2, "steps": 4, "fit_minutes": 1, "image_AUROC": 0.5, "pixel_AUPRO": 0.5}
    curves.curves_results(tmp_path / "curves.csv").append(tested)
    table, _, picture = transport.run_transport(path, tmp_path / "curves.csv", tmp_path / "transport.png")
    assert cells(table)[2].startswith("| tiny | 0 | 4 | 1 | 50.0 | 50.0 |")
    assert Path(picture).is_file()


def test_times_of_larger_inputs_are_told_per_pixel(tmp_path):
    for side, milliseconds in ((256, 4), (512, 24)):
        fixed = {"backbone": "resnet18", "precision": "int8", "threads": 2, "image_size": 256, "input_size": side}
        row = {"model": f"RD++, {side} px", **fixed, "median_ms": milliseconds}
        latency_results(tmp_path / "latency.csv").append(row)
        results(tmp_path / "rows.csv", {("mtd", "RD++"): [0.9]}, pixel_AUPRO=0.8, image_size=side)
    table, _, accuracy, _, picture = larger.draw_larger(
        tmp_path / "latency.csv", tmp_path / "rows.csv", tmp_path / "larger.png"
    )
    assert cells(table)[2] == "| RD++ | 4.0 ms | 24 ms | 1.00 | 1.50 |"
    assert accuracy.count("| mtd ") == 2
    assert Path(picture).is_file()


@pytest.mark.parametrize("config", PAPERS, ids=lambda path: path.stem)
def test_published_figures_belong_to_runs_of_their_grid(config, tmp_path):
    results(tmp_path / "rows.csv", {("elsewhere", "one"): [0.5]})
    lines = papers.published_table(read_accuracy(tmp_path / "rows.csv").astype({"epochs": int}), config).splitlines()
    assert len(lines) == 4 + len(read_grid(config)["published"])
    assert all("not run" in line for line in lines[4:])


def results(path, figures, **facts):
    """Write rows of a CSV: image AUROC by data and model."""
    for (data, model), values in figures.items():
        for seed, value in enumerate(values):
            row = {"data": data, "model": model, "seed": seed, "epochs": 1, "image_size": 64, "batch_size": 2}
            accuracy_results(path).append({**row, "protocol": "last", "image_AUROC": value, **facts})


def test_ranking_has_mean_and_rank_of_the_data_that_all_models_have(tmp_path):
    path = tmp_path / "rows.csv"
    results(
        path,
        {("a", "one"): [0.9, 0.8], ("a", "two"): [0.7], ("b", "one"): [0.5], ("b", "two"): [0.6], ("c", "one"): [0.1]},
    )
    table, picture = papers.compare(path, pictures=tmp_path)
    assert cells(table)[2] == "| data | one | two |"
    assert cells(table)[4:] == [
        "| a | **85.0 ± 7.1** | 70.0 |",
        "| b | 50.0 | **60.0** |",
        "| c | **10.0** | - |",
        "| mean of 2 | 67.5 | 65.0 |",
        "| mean rank | 1.5 | 1.5 |",
    ]
    assert picture.name == "accuracy_64_2_last.png"


def test_protocols_are_not_ranked_together(tmp_path):
    path = tmp_path / "rows.csv"
    results(path, {("a", "one"): [0.9], ("b", "one"): [0.9]})
    results(path, {("a", "two"): [0.8], ("b", "two"): [0.8]}, protocol="best on test")
    table, *pictures = papers.compare(path, pictures=tmp_path)
    assert table == ""
    assert [picture.name for picture in pictures] == ["accuracy_64_2_last.png", "accuracy_64_2_best_on_test.png"]


def test_published_figures_stand_beside_ours(tmp_path):
    entry = {"epochs": 1, "class_path": "anomalib.data.MVTecAD", "categories": ["x", "y"]}
    published = [
        {"data": "set", "model": "one", "image_AUROC": 80.0, "source": "paper"},
        {"data": "set", "model": "two", "image_AUROC": 99.0, "source": "paper"},
        {"data": "set/x", "model": "two", "over": "one", "image_AUROC": 1.0, "source": "others"},
    ]
    grid = {"seeds": [0], "image_size": 64, "batch_size": 2, "models": {"one": TOY, "two": TOY}, "data": {"set": entry}}
    config, path = tmp_path / "grid.yaml", tmp_path / "rows.csv"
    config.write_text(yaml.safe_dump({**grid, "published": published}))
    results(path, {("set/x", "one"): [0.9], ("set/y", "one"): [0.8], ("set/x", "two"): [0.95]})
    (text,) = papers.compare(path, [config])
    lines = cells(text.split("Ours, published")[1])[4:]
    assert [line.split(" | ")[4] for line in lines] == [
        "85.0, 80.0 (+5.0)",
        "95.0 of 1 of 2, 99.0",
        "+5.0, +1.0 (+4.0)",
    ]
    config.write_text(yaml.safe_dump({**grid, "published": [{**published[0], "model": "three"}]}))
    with pytest.raises(ValueError, match="published figures of three on set, but no such runs"):
        papers.compare(path, [config])


def test_accuracy_over_latency_is_of_one_data_set_and_of_the_largest_bank(tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    times = dict.fromkeys(("median_ms", "p10_ms", "p90_ms", "rounds", "peak_mib"), 1)
    fixed = {"backbone": "resnet18", "precision": "fp32", "threads": 2, "image_size": 256}
    for model in (
        "RD++",
        "RD++, light 1/2",
        "PatchCore, bank 2048",
        "PatchCore, bank 16384",
        "PatchCore, 2 %",
        "untested",
    ):
        slower = dict.fromkeys(("median_ms", "p10_ms", "p90_ms"), 2) if model.endswith("16384") else {}
        latency_results(tmp_path / "latency.csv").append({"model": model, **fixed, **times, **slower})
    facts = {"epochs": 1, "batch_size": 8, "protocol": "last", "seed": 0}
    for data, size, model, auroc in (
        ("mtd", 256, "RD++", 0.5),
        ("mtd", 128, "RD++", 0.9),
        ("cookie/a", 256, "PatchCore", 0.7),
        ("cookie/a", 256, "PatchCore, 2 %", 0.6),
        ("cookie/a", 256, "RD++", 0.9),
        ("other", 256, "other", 0.9),
    ):
        row = {"data": data, "image_size": size, "model": model, "image_AUROC": auroc, "pixel_AUPRO": auroc / 2}
        accuracy_results(tmp_path / "rows.csv").append({**facts, **row})
    for epoch, auroc in ((1, 0.3), (2, 0.4)):
        row = {"data": "mtd", "image_size": 256, "model": "untested", "image_AUROC": auroc, "pixel_AUPRO": 0.1}
        curves.curves_results(tmp_path / "curves.csv").append({**row, "seed": 0, "batch_size": 8, "epoch": epoch})
    drawn, titles, scatter = [], [], Axes.scatter

    def record(axis, x, y, label, **options):
        drawn.append((label.split(": ")[0], y))
        return scatter(axis, x, y, label=label, **options)

    monkeypatch.setattr(Axes, "scatter", record)
    monkeypatch.setattr(Figure, "suptitle", lambda _, text, **__: titles.append(text.splitlines()[0]))
    tested = [tmp_path / "rows.csv", tmp_path / "curves.csv"]
    bars, *pictures = chart.draw_charts(tmp_path / "latency.csv", tested, tmp_path)
    assert bars.name == "latency_resnet18_256px_2threads.png"
    assert [path.stem.removeprefix("accuracy_latency_resnet18_256px_2threads_") for path in pictures] == [
        "mtd",
        "cookie_a",
    ]
    assert titles == [f"{data}, 256 px: last epoch, tested once, mean of seeds" for data in ("mtd", "cookie/a")]
    assert drawn == [
        *(("RD++", 50), ("untested", 40)),
        *(("RD++", 25), ("untested", 10)),
        *(("RD++", 90), ("PatchCore, bank 16384", 70), ("PatchCore, 2 %", 60)),
        *(("RD++", 45), ("PatchCore, bank 16384", 35), ("PatchCore, 2 %", 30)),
    ]


def test_links_of_the_long_results_lead_somewhere():
    text = (ROOT / "experiments/RESULTS.md").read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (ROOT / "experiments" / target).exists(), target
    for path in re.findall(r"(?:experiments|configs)/[\w/.]+\.(?:yaml|csv|py)", text):
        assert (ROOT / path).exists(), path
