"""The accuracy benchmark: rows written once, failures told, parts of data, shards."""

import csv
import shutil
import subprocess
import sys
from mmap import mmap
from pathlib import Path
from unittest import mock

import openvino
import pytest
import yaml

from anomalib_rdpp.benchmark import accuracy
from anomalib_rdpp.benchmark.accuracy import COLUMNS, run_accuracy
from anomalib_rdpp.benchmark.probe import has_bfloat16, peak_mib, reset_peak
from anomalib_rdpp.benchmark.report import accuracy_table
from anomalib_rdpp.benchmark.rows import append_row, read_rows

RDPP = {"class_path": "anomalib_rdpp.RDPP", "init_args": {"backbone": "resnet18", "pre_trained": False}}


@pytest.fixture
def grid(tiny_folder, tmp_path):
    """Write a grid of models on the tiny images, two of the six training images, and say where."""

    def write(seeds, **models):
        data = {
            "class_path": "anomalib.data.Folder",
            "epochs": 1,
            "train_every": 3,
            "init_args": {
                "name": "tiny",
                "root": str(tiny_folder),
                "normal_dir": "train/good",
                "normal_test_dir": "test/good",
                "abnormal_dir": "test/square",
                "mask_dir": "ground_truth/square",
            },
        }
        path = tmp_path / "grid.yaml"
        content = {"seeds": seeds, "image_size": 64, "batch_size": 2, "models": models, "data": {"tiny": data}}
        path.write_text(yaml.safe_dump(content))
        return path, tmp_path / "rows.csv"

    return write


def test_failed_model_is_told_and_the_rest_complete(grid):
    config, output = grid([0], broken={"class_path": "anomalib.models.Nothing"}, ours=RDPP)
    run_accuracy(config, output)
    broken, ours = read_rows(output, COLUMNS)
    assert "Nothing" in broken["error"]
    assert ours["error"] == ""
    assert 0 <= float(ours["image_AUROC"]) <= 1
    assert int(ours["peak_memory_mib"]) > 0
    assert (ours["train_images"], ours["test_images"], ours["steps"]) == ("2", "8", "1")
    table = accuracy_table(output)
    assert "| tiny | 64 | broken | 0 (1 failed) |" in table
    assert "| tiny | 64 | ours | 1 |" in table


def test_peak_memory_falls_after_a_reset():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux can reset the peak")
    with mmap(-1, 2**27) as memory:  # 128 MiB, not of the heap, which may have them free from earlier tests
        memory.write(bytes(2**27))
        before = peak_mib()
    reset_peak()
    assert peak_mib() < before - 100


def test_missing_data_set_is_told_and_the_rest_complete(grid):
    config, output = grid([0], ours=RDPP)
    content = yaml.safe_load(config.read_text())
    data = content["data"]["tiny"]
    missing = {**data, "init_args": {**data["init_args"], "root": "/nowhere"}}
    config.write_text(yaml.safe_dump({**content, "data": {"missing": missing, "tiny": data}}))
    run_accuracy(config, output)
    assert [(row["data"], bool(row["error"])) for row in read_rows(output, COLUMNS)] == [
        ("missing", True),
        ("tiny", False),
    ]


def test_grid_killed_in_the_middle_loses_no_run_and_doubles_none(grid, monkeypatch):
    config, output = grid([0, 1, 2], one=RDPP, two=RDPP)
    begun = []

    def killed_in_the_fourth(_grid, data, model, seed, *_):
        begun.append((model, seed))
        if len(begun) == 4:
            raise KeyboardInterrupt
        return {data: {"image_AUROC": 0.5}}

    monkeypatch.setattr(accuracy, "_train_and_test", killed_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run_accuracy(config, output)
    assert len(read_rows(output, COLUMNS)) == 3
    with output.open("a") as file:
        file.write("tiny,two,1,1,")  # a row that was cut short
    run_accuracy(config, output)
    runs = [(row["model"], row["seed"]) for row in read_rows(output, COLUMNS)]
    assert sorted(runs) == sorted((model, seed) for model in ("one", "two") for seed in "012")
    assert len(begun) == 7  # the killed one twice


def test_rows_of_an_older_file_are_kept_and_their_protocol_known(grid):
    config, output = grid([0], ours=RDPP)
    older = [name for name in COLUMNS if name not in ("protocol", "teacher")]
    facts = {"epochs": 1, "image_size": 64, "batch_size": 2, "image_AUROC": 0.5}
    append_row(output, older, {"data": "tiny", "model": "ours", "seed": 0, **facts})
    run_accuracy(config, output)
    assert len(read_rows(output, COLUMNS)) == 1  # not run again
    append_row(
        output, COLUMNS, {"data": "tiny", "model": "other", "seed": 0, **facts, "protocol": "last", "teacher": "T"}
    )
    assert [row["teacher"] for row in read_rows(output, COLUMNS)] == ["", "T"]
    assert "last epoch, tested once. Teacher: not recorded (ours); T (other)." in accuracy_table(output)


def test_row_that_begins_like_the_header_is_a_row(tmp_path):
    for columns in (["data", "model", "seed"], COLUMNS):
        for model in ("data", "model"):
            append_row(tmp_path / "rows.csv", columns, {"data": "data", "model": model, "seed": 0})
    rows = read_rows(tmp_path / "rows.csv", COLUMNS)
    assert [(row["data"], row["model"]) for row in rows] == [("data", "data"), ("data", "model")] * 2
    assert (tmp_path / "rows.csv").read_text().count("data,model,seed") == 2


def test_best_epoch_on_test_is_a_row_of_its_own_and_said(grid):
    config, output = grid([0], ours={**RDPP, "epochs": 2})
    for best_on_test in (False, True, True):
        run_accuracy(config, output, best_on_test=best_on_test)
    last, best = read_rows(output, COLUMNS)
    assert (last["protocol"], best["protocol"]) == ("last", "best on test")
    assert (best["error"], best["test_images"], best["steps"]) == ("", "8", "2")
    assert 0 <= float(best["pixel_AUPRO"]) <= 1
    assert "**best epoch on the test images**" in accuracy_table(output)


@pytest.mark.slow
def test_runs_of_two_processes_are_one_row_each(grid):
    config, output = grid([0, 1], ours=RDPP)
    trainer = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "trainer": trainer}))
    command = [sys.executable, "-m", "anomalib_rdpp.benchmark", "accuracy", str(config), "--output", str(output)]
    subprocess.run(command, check=True, timeout=600)
    assert [(row["seed"], row["error"], row["steps"]) for row in read_rows(output, COLUMNS)] == [
        ("0", "", "1"),
        ("1", "", "1"),
    ]


def test_file_that_is_no_grid_is_named(tmp_path, capsys):
    from anomalib_rdpp.benchmark.__main__ import main

    config = tmp_path / "other.yaml"
    config.write_text("models: {}")
    with pytest.raises(SystemExit):
        main(["accuracy", str(config), "--output", str(tmp_path / "rows.csv")])
    assert "other.yaml' is no grid of the accuracy benchmark: it has no batch_size, data" in capsys.readouterr().err


def test_row_that_is_there_is_not_run_again(grid):
    config, output = grid([0], ours=RDPP)
    run_accuracy(config, output)
    before = output.read_text()
    run_accuracy(config, output)
    assert output.read_text() == before


def test_shards_share_the_grid(grid):
    broken = {"class_path": "anomalib.models.Nothing"}
    config, output = grid([0, 1, 2], broken=broken)
    run_accuracy(config, output, (2, 2))
    assert [row["seed"] for row in csv.DictReader(output.open())] == ["1"]
    run_accuracy(config, output, (1, 2))
    assert sorted(row["seed"] for row in read_rows(output, COLUMNS)) == ["0", "1", "2"]


def test_bad_shard_is_named(grid):
    with pytest.raises(ValueError, match="1 <= i <= n, got 3/2"):
        run_accuracy(*grid([0]), (3, 2))


def test_report_without_rows_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="benchmark accuracy CONFIG"):
        accuracy_table(tmp_path / "none.csv")


def test_trained_models_are_drawn_and_tested_in_every_precision(grid, tmp_path, monkeypatch):
    from anomalib_rdpp.benchmark import precision
    from anomalib_rdpp.benchmark.gallery import draw_gallery

    config, output = grid([0], ours=RDPP)
    with pytest.raises(FileNotFoundError, match=r"benchmark accuracy"):
        draw_gallery([config], output.parent, tmp_path / "gallery")
    run_accuracy(config, output)
    second, content = tmp_path / "second.yaml", yaml.safe_load(config.read_text())
    content["data"] = {"again": content["data"]["tiny"]}
    second.write_text(yaml.safe_dump(content))
    shutil.copytree(output.parent / "tiny", output.parent / "again")
    pictures = draw_gallery([config, second], output.parent, tmp_path / "gallery")
    assert [path.name for path in pictures] == ["tiny.png", "again.png"]
    with pytest.raises(ValueError, match=r"Two grids have 'ours' on tiny: rename it in one grid"):
        draw_gallery([config, config], output.parent, tmp_path / "gallery")
    content["data"]["again"]["test_every"] = 8
    second.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"all 1 test images of again are (defects|normal): add the other kind"):
        draw_gallery([second], output.parent, tmp_path / "gallery")

    four = ("torch", "fp32", "fp16", "int8")
    precision.run_precision(config, output.parent, tmp_path / "precision.csv", precisions=four)
    rows = read_rows(tmp_path / "precision.csv", precision.COLUMNS)
    assert tuple(row["precision"] for row in rows) == four
    with pytest.raises(ValueError, match=r"Unknown 'int4'; choose of 'torch', 'fp32'"):
        precision.run_precision(config, output.parent, tmp_path / "precision.csv", precisions=["int4"])
    trained = read_rows(output, COLUMNS)[0]
    assert {name: rows[0][name] for name in precision.METRICS} == {name: trained[name] for name in precision.METRICS}
    assert rows[1]["image_AUROC"] == rows[0]["image_AUROC"]
    assert "| tiny | 64 | ours | 0 | fp32 |" in precision.precision_table(tmp_path / "precision.csv")

    monkeypatch.setattr(precision, "_answers", lambda *_: {"fp16": lambda: 1 / 0, "int8": lambda: None})
    monkeypatch.setattr(precision, "_test", lambda *_: {})
    for _ in range(2):
        precision.run_precision(config, output.parent, tmp_path / "broken.csv", precisions=["fp16", "int8"])
    rows = read_rows(tmp_path / "broken.csv", precision.COLUMNS)
    assert [(row["precision"], row["error"]) for row in rows] == [
        ("fp16", "ZeroDivisionError: division by zero"),
        ("int8", ""),
        ("fp16", "ZeroDivisionError: division by zero"),
    ]


def test_precision_of_a_host_model_that_normalises_is_that_of_its_test(grid, tmp_path, monkeypatch):
    from anomalib_rdpp.benchmark import precision

    given = []

    def answers(model, *_):
        def answer(images):
            given.append(images)
            return model(images)._asdict()

        return {"torch": lambda: answer}

    monkeypatch.setattr(precision, "_answers", answers)
    random = {"backbone": "resnet18", "pre_trained": False}
    config, output = grid([0], host={"class_path": "anomalib.models.Patchcore", "init_args": random})
    run_accuracy(config, output)
    precision.run_precision(config, output.parent, tmp_path / "precision.csv", precisions=["torch"])
    assert all(images.min() >= 0 and images.max() <= 1 for images in given), "the model normalises them itself"
    (trained,), (tested,) = read_rows(output, COLUMNS), read_rows(tmp_path / "precision.csv", precision.COLUMNS)
    for name in precision.METRICS:
        assert float(tested[name]) == pytest.approx(float(trained[name]), abs=1e-3), name


def test_precision_of_a_model_without_checkpoint_is_told(grid, tmp_path):
    from anomalib_rdpp.benchmark import precision

    config, output = grid([0], ours=RDPP)
    precision.run_precision(config, output.parent, tmp_path / "precision.csv", precisions=["torch", "int8"])
    rows = read_rows(tmp_path / "precision.csv", precision.COLUMNS)
    assert [row["precision"] for row in rows] == ["torch", "int8"]
    assert all("No trained model" in row["error"] for row in rows)


def test_analyses_of_trained_models(grid, tmp_path, capsys):
    from anomalib_rdpp.benchmark.__main__ import main
    from anomalib_rdpp.benchmark.analyses import COLUMNS as ANALYSES

    random = {"init_args": {"backbone": "resnet18", "pre_trained": False}}
    models = {
        "RD": {"class_path": "anomalib.models.ReverseDistillation", **random},
        "RD++": RDPP,
        "AAND": {"class_path": "anomalib_rdpp.AAND", **random},
        "PatchCore": {"class_path": "anomalib.models.Patchcore", **random},
    }
    config, output = grid([0], **models)
    run_accuracy(config, output)
    config, _ = grid([0], **models, untrained=RDPP)
    second, content = tmp_path / "second.yaml", yaml.safe_load(config.read_text())
    content |= {"data": {"again": content["data"]["tiny"]}, "models": {"untrained": RDPP}}
    second.write_text(yaml.safe_dump(content))
    csv_path = tmp_path / "analyses.csv"
    main(["analyses", str(config), str(second), "--results", str(output.parent), "--output", str(csv_path)])
    *rows, last = read_rows(csv_path, ANALYSES)
    assert (last["data"], last["model"]) == ("again", "untrained")
    rows = {row["model"]: row for row in rows}
    assert [name for name, row in rows.items() if row["error"]] == ["untrained"]
    for name in ("normal", "normal_mse", "abnormal", "noise"):
        assert rows["RD"][f"teacher_{name}"] == rows["RD"][f"student_{name}"] != ""  # RD's student sees the teacher
        assert rows["RD++"][f"teacher_{name}"] != rows["RD++"][f"student_{name}"]
    assert rows["PatchCore"]["student_normal"] == ""
    assert all(0 <= float(row["pixel_overlap"]) <= 1 for row in rows.values() if not row["error"])
    printed = capsys.readouterr().out
    assert "| tiny | 64 | RD++ | 1 |" in printed
    assert (tmp_path / "analyses_tiny.png").is_file()


def test_latency_of_ours_and_the_hosts_is_measured_and_a_broken_model_told(tmp_path, monkeypatch):
    from anomalib_rdpp.benchmark import latency
    from anomalib_rdpp.benchmark.latency import COLUMNS as LATENCY
    from anomalib_rdpp.benchmark.latency import run_latency
    from anomalib_rdpp.benchmark.speed import draw_latency, latency_table

    models = {
        "RD++": {"class_path": "anomalib_rdpp.RDPP"},
        "PatchCore": {"class_path": "anomalib.models.Patchcore", "bank": 20},
        "CFA": {"class_path": "anomalib.models.Cfa"},
        "broken": {"class_path": "anomalib.models.Nothing"},
        "lost": {"class_path": "anomalib_rdpp.RDPP", "ckpt_path": str(tmp_path / "none.ckpt")},
    }
    precisions = ["torch", "fp32", "bf16"]
    grid = {"image_size": 64, "rounds": 2, "threads": [1], "precisions": precisions, "backbones": ["resnet18"]}
    left = precisions[: 3 if has_bfloat16() else 2]
    config, output = tmp_path / "grid.yaml", tmp_path / "rows.csv"
    config.write_text(yaml.safe_dump({**grid, "precisions": ["int8"], "models": models}))
    run_latency(config, output, precisions=precisions)
    rows = read_rows(output, LATENCY)
    assert [(row["model"], row["precision"]) for row in rows if row["error"]] == [
        (model, precision) for model in ("broken", "lost") for precision in left
    ]
    measured = {(row["model"], row["precision"]): row for row in rows if not row["error"]}
    assert len(measured) == 3 * len(left)
    assert all(float(row["median_ms"]) > 0 and float(row["peak_mib"]) > 0 for row in measured.values())
    assert measured["PatchCore", "fp32"]["bank"] == "20 x 384"
    assert measured["CFA", "fp32"]["bank"].startswith("256 x")
    table = latency_table(output)
    assert "| RD++ |" in table
    assert f"| broken | - | {' | '.join(['failed'] * len(left))} | - |" in table
    assert all(path.is_file() for path in draw_latency(output, tmp_path / "pictures"))

    from anomalib_rdpp.benchmark.layers import layer_table

    exported = next((tmp_path / "latency_models").rglob("model.xml"))
    table = layer_table(exported, size=64, rounds=2)
    assert "GMAC of convolutions" in table
    assert all(line.rstrip(" |")[-1].isdigit() for line in table.splitlines() if line.startswith("| Convolution |"))

    candidates = [
        latency.Candidate({**measured["RD++", "fp32"], "model": model}, path, "f32")
        for model, path in (("unreadable", config), ("RD++", exported))
    ]
    monkeypatch.setattr(latency, "_probe", lambda *_: {})
    latency._measure(candidates, 1, 64, 1, 60.0, tmp_path / "more.csv")
    assert [bool(row["error"]) for row in read_rows(tmp_path / "more.csv", LATENCY)] == [True, False]


def test_ratios_are_told_without_and_with_bfloat16(tmp_path):
    from anomalib_rdpp.benchmark import latency
    from anomalib_rdpp.benchmark.speed import latency_table

    fixed = {"backbone": "resnet18", "threads": 2, "image_size": 256, "rounds": 3, "gmac": 1}
    for model, precision, median in (
        ("RD++", "fp32", 4),
        ("RD++", "int8", 2),
        ("RD++", "int8, bf16", 1),
        ("PatchCore", "fp32", 9),
        ("PatchCore", "bf16", 5),
    ):
        times = dict.fromkeys(("median_ms", "p10_ms", "p90_ms"), median)
        facts = {"file_mib": 7 if precision == "int8" else 0, "first_result_ms": 8, "peak_mib": 9}
        row = {"model": model, "precision": precision, **fixed, **times, **facts}
        append_row(tmp_path / "rows.csv", latency.COLUMNS, row)
    table = latency_table(tmp_path / "rows.csv").splitlines()[2:]
    assert table[0].endswith("| x RD++ int8 | with bf16 |")
    assert table[2].endswith("| 8 | 9 | 7 | 1.0 | 0.5 |"), "first result, memory and file are those of int8"
    assert table[3].endswith("| 4.5 | 2.5 |")


def test_grid_that_latency_cannot_take_is_refused(tmp_path, monkeypatch):
    from anomalib_rdpp.benchmark.latency import run_latency

    grid = {
        "image_size": 64,
        "rounds": 2,
        "threads": [1],
        "precisions": ["int4"],
        "backbones": ["resnet18", "resnet34"],
    }
    models = {"stored": {"class_path": "anomalib_rdpp.RDPP", "ckpt_path": "model.ckpt"}}
    config = tmp_path / "grid.yaml"
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "INT8"])
    for content, message in (
        (
            {"models": models, "image_size": 64},
            r"grid.yaml' is no grid of the latency benchmark: it has no backbones, p",
        ),
        ({**grid, "models": {}}, r"Unknown precision .*int4.*choose of 'torch', .*'int8, bf16'"),
        (
            {**grid, "models": models, "precisions": ["fp32"]},
            r"but stored would be measured with each of resnet18, res",
        ),
        ({**grid, "models": {}, "precisions": ["bf16"]}, r"Nothing is left to measure: this CPU has no bfloat16"),
    ):
        config.write_text(yaml.safe_dump(content))
        with pytest.raises(ValueError, match=message):
            run_latency(config, tmp_path / "rows.csv")


def test_export_of_a_checkpoint_that_changed_is_not_taken(tmp_path):
    from anomalib_rdpp.benchmark.latency import _stamp

    path = tmp_path / "model.ckpt"
    stamps = [_stamp({"ckpt_path": str(path)}) for text in ("one", "other") if path.write_text(text)]
    assert stamps[0] != stamps[1]


def test_accuracy_over_latency_is_of_one_data_set_and_has_a_bubble_per_bank(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    from anomalib_rdpp.benchmark import latency, speed

    times = dict.fromkeys((*latency.COLUMNS[5:13], "processor"), 1)
    fixed = {"backbone": "resnet18", "precision": "fp32", "threads": 2, "image_size": 256}
    for model in ("RD++", "PatchCore, bank 2048", "PatchCore, bank 16384", "PatchCore, 2 %", "untested"):
        append_row(tmp_path / "latency.csv", latency.COLUMNS, {"model": model, **fixed, **times})
    facts = {"epochs": 1, "batch_size": 8, "protocol": "last", "seed": 0}
    for data, size, model, auroc in (
        ("mtd", 256, "RD++", 0.5),
        ("mtd", 128, "RD++", 0.9),
        ("cookie/a", 256, "PatchCore", 0.7),
        ("cookie/a", 256, "PatchCore, 2 %", 0.6),
        ("cookie/a", 256, "RD++", 0.9),
        ("other", 256, "other", 0.9),
    ):
        row = {"data": data, "image_size": size, "model": model, "image_AUROC": auroc}
        append_row(tmp_path / "rows.csv", COLUMNS, {**facts, **row})
    drawn, titles, scatter = [], [], Axes.scatter

    def record(axis, x, y, label, **options):
        drawn.append((label.split(": ")[0], y))
        return scatter(axis, x, y, label=label, **options)

    monkeypatch.setattr(Axes, "scatter", record)
    monkeypatch.setattr(Axes, "set_title", lambda _, text, **__: titles.append(text.splitlines()[0]))
    monkeypatch.setattr(speed, "_bars", lambda *_: tmp_path / "bars.png")
    pictures = speed.draw_latency(tmp_path / "latency.csv", tmp_path, tmp_path / "rows.csv")
    assert [path.stem.removeprefix("accuracy_latency_resnet18_256px_2threads_") for path in pictures[1:]] == [
        "mtd",
        "cookie_a",
    ]
    assert titles == ["mtd, 256 px", "cookie/a, 256 px"]
    assert drawn == [
        ("RD++", 50),
        ("RD++", 90),
        ("PatchCore, bank 2048", 70),
        ("PatchCore, bank 16384", 70),
        ("PatchCore, 2 %", 60),
    ]


def test_profile_without_a_model_says_which_file(tmp_path):
    from anomalib_rdpp.benchmark.layers import layer_table

    with pytest.raises(FileNotFoundError, match=r"No model at '.*none.xml': give the .xml"):
        layer_table(tmp_path / "none.xml")


def test_steps_of_both_ways_are_timed(tmp_path):
    from anomalib_rdpp.benchmark.steps import COLUMNS as STEPS
    from anomalib_rdpp.benchmark.steps import run_steps

    table = run_steps(tmp_path / "steps.csv", size=64, batch=2, rounds=1)
    assert "| transport |" in table
    rows = read_rows(tmp_path / "steps.csv", STEPS)
    assert {row["way"] for row in rows} == {"ours", "published"}
    assert all(float(row["median_ms"]) > 0 for row in rows)


def test_curves_have_a_row_per_test_and_are_drawn(grid, tmp_path):
    from anomalib_rdpp.benchmark.curves import COLUMNS as CURVES
    from anomalib_rdpp.benchmark.curves import curves_table, draw_curves, run_curves

    average = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.5}}
    broken = {"class_path": "anomalib.models.Nothing"}
    config, output = grid([0], ours=RDPP, another=broken, averaged={**RDPP, "callbacks": [average]})
    content = yaml.safe_load(config.read_text())
    content["data"]["tiny"]["epochs"] = 2
    config.write_text(yaml.safe_dump({**content, "every": 4}))
    with pytest.raises(ValueError, match="needs `every`, the epochs from test to test, which divides"):
        run_curves(config, output)
    config.write_text(yaml.safe_dump({**content, "every": 1}))
    run_curves(config, output)
    rows = read_rows(output, CURVES)
    assert [(row["model"], row["epoch"]) for row in rows] == [
        (model, epoch) for model in ("averaged", "ours") for epoch in "12"
    ]
    assert all(float(row["pixel_AUPRO"]) >= 0 and float(row["val_distance"]) > 0 for row in rows)
    minutes = [float(row["fit_minutes"]) for row in rows]
    assert 0 < minutes[0] < minutes[1]
    run_curves(config, output)
    assert len(read_rows(output, CURVES)) == 4
    assert "| tiny | averaged | 1 | 2 |" in curves_table(output)
    assert [path.name for path in draw_curves(output, tmp_path / "pictures")] == ["curves_tiny.png"]


def test_curves_take_the_trainer_of_the_grid_and_of_the_model(grid, monkeypatch):
    from anomalib_rdpp.benchmark import curves

    config, output = grid([0], ours={**RDPP, "trainer": {"devices": 2}}, alone=RDPP)
    content = {**yaml.safe_load(config.read_text()), "every": 1, "trainer": {"devices": 1, "strategy": "ddp"}}
    config.write_text(yaml.safe_dump(content))
    asked = []
    monkeypatch.setattr(curves, "Engine", lambda **options: asked.append(options) or mock.Mock())
    curves.run_curves(config, output)
    assert [(options["devices"], options["strategy"]) for options in asked] == [(1, "ddp"), (2, "ddp")]


def test_model_of_an_unfinished_run_is_not_taken(grid):
    from anomalib_rdpp.benchmark.grid import load_trained

    config, output = grid([0], ours=RDPP)
    run_accuracy(config, output)
    content = yaml.safe_load(config.read_text())
    assert load_trained(content, "tiny", "ours", 0, output.parent)
    for own in ({"projection": False}, {"backbone": "resnet34"}):
        content["models"]["ours"] = {**RDPP, "init_args": RDPP["init_args"] | own}
        with pytest.raises(ValueError, match=r"is of another model than the grid's ours"):
            load_trained(content, "tiny", "ours", 0, output.parent)
    folder = output.parent / "tiny" / "ours"
    (folder / "64px_batch2_1epochs_seed0").rename(folder / "64px_batch2_5epochs_seed0")
    content["data"]["tiny"]["epochs"] = 5
    with pytest.raises(FileNotFoundError, match="No trained model"):
        load_trained(content, "tiny", "ours", 0, output.parent)
