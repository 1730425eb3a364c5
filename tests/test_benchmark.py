"""The benchmarks: rows written once, failures told, parts of data, shards, any model by a YAML entry."""

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
from mmap import mmap
from pathlib import Path
from types import SimpleNamespace

import openvino
import pytest
import torch
import yaml

from anomalib_rdpp.benchmark import accuracy, latency, precision
from anomalib_rdpp.benchmark.__main__ import main
from anomalib_rdpp.benchmark.accuracy import COLUMNS, accuracy_results, run_accuracy
from anomalib_rdpp.benchmark.build import load_trained
from anomalib_rdpp.benchmark.exports import PRECISIONS
from anomalib_rdpp.benchmark.filled import bank_of, build_filled
from anomalib_rdpp.benchmark.gallery import run_gallery
from anomalib_rdpp.benchmark.latency import latency_results, run_latency
from anomalib_rdpp.benchmark.precision import precision_results, run_precision
from anomalib_rdpp.benchmark.probe import has_bfloat16, peak_mib, reset_peak
from anomalib_rdpp.benchmark.report import accuracy_table, latency_table, read_accuracy

pytestmark = pytest.mark.no_cover  # coverage leaves the benchmark out
ROOT = Path(__file__).parents[1]
TOY = {"class_path": "benchmark_toy.Toy"}
BROKEN = {"class_path": "anomalib.models.Nothing"}


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


def cells(table):
    """Take the padding out of a Markdown table."""
    return [" ".join(line.split()) for line in table.splitlines()]


def change(config, **keys):
    """Write a grid again with other keys."""
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | keys))


def rows_of(path):
    return accuracy_results(path).rows()


def append(path, row):
    accuracy_results(path).append(row)


def test_failed_model_is_told_and_the_rest_complete(grid):
    config, output = grid([0], broken=BROKEN, ours=TOY)
    run_accuracy([config], output)
    broken, ours = rows_of(output)
    assert "Nothing" in broken["error"]
    assert ours["error"] == ""
    assert 0 <= float(ours["image_AUROC"]) <= 1
    assert int(ours["peak_memory_mib"]) > 0
    assert float(ours["fit_cpu_minutes"]) >= 0
    assert (ours["train_images"], ours["test_images"], ours["steps"]) == ("2", "8", "1")
    assert (ours["protocol"], ours["image_size"], ours["input_size"]) == ("last", "64", "64")
    table = cells(accuracy_table(read_accuracy(output)))
    assert any("| tiny | 64 | broken | 0 (1 failed) |" in line for line in table)
    assert any("| tiny | 64 | ours | 1 |" in line for line in table)


def test_peak_memory_falls_after_a_reset():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux can reset the peak")
    with mmap(-1, 2**27) as memory:  # 128 MiB, not of the heap, which may have them free from earlier tests
        memory.write(bytes(2**27))
        before = peak_mib()
    reset_peak()
    assert peak_mib() < before - 100


def test_missing_data_set_is_told_and_the_rest_complete(grid):
    config, output = grid([0], ours=TOY)
    data = yaml.safe_load(config.read_text())["data"]["tiny"]
    change(config, data={"missing": {**data, "init_args": {**data["init_args"], "root": "/nowhere"}}, "tiny": data})
    run_accuracy([config], output)
    assert [(row["data"], bool(row["error"])) for row in rows_of(output)] == [("missing", True), ("tiny", False)]


def test_set_without_defects_has_no_image_auroc(grid, caplog):
    config, output = grid([0], ours=TOY)
    data = yaml.safe_load(config.read_text())["data"]["tiny"]
    for name in ("abnormal_dir", "mask_dir"):
        del data["init_args"][name]
    change(config, data={"good": data})
    run_accuracy([config], output)
    (row,) = rows_of(output)
    assert (row["error"], row["test_images"], *(row[name] for name in accuracy.METRICS)) == ("", "4", "", "", "", "")
    assert "all test images of good are normal" in caplog.text
    assert any("| good | 64 | ours | 1 |" in line for line in cells(accuracy_table(read_accuracy(output))))


def test_grid_killed_in_the_middle_loses_no_run_and_doubles_none(grid, monkeypatch):
    config, output = grid([0, 1, 2], one=TOY, two=TOY)
    begun = []

    def killed_in_the_fourth(_grid, data, model, seed, *_):
        begun.append((model, seed))
        if len(begun) == 4:
            raise KeyboardInterrupt
        return {data: {"image_AUROC": 0.5}}

    monkeypatch.setattr(accuracy, "_train_and_test", killed_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run_accuracy([config], output)
    assert len(rows_of(output)) == 3
    with output.open("a") as file:
        file.write("tiny,two,1,1,")  # a row that was cut short
    run_accuracy([config], output)
    runs = [(row["model"], row["seed"]) for row in rows_of(output)]
    assert sorted(runs) == sorted((model, seed) for model in ("one", "two") for seed in "012")
    assert len(begun) == 7  # the killed one twice


def test_failed_row_is_tried_again_and_the_last_counts(grid, monkeypatch):
    config, output = grid([0], ours=TOY)
    monkeypatch.setattr(accuracy, "_train_and_test", lambda *_: 1 / 0)
    run_accuracy([config], output)
    monkeypatch.setattr(accuracy, "_train_and_test", lambda *_: {"tiny": {"image_AUROC": 0.5}})
    run_accuracy([config], output)
    run_accuracy([config], output)
    assert [row["error"] for row in rows_of(output)] == ["ZeroDivisionError: division by zero", ""]
    assert len(read_accuracy(output)) == 1


def test_rows_of_an_older_file_are_kept_and_their_protocol_known(grid):
    config, output = grid([0], ours=TOY)
    older = [name for name in COLUMNS if name not in ("protocol", "teacher", "input_size")]
    row = {"data": "tiny", "model": "ours", "seed": 0, "epochs": 1, "image_size": 64, "batch_size": 2}
    with output.open("w") as file:
        writer = csv.DictWriter(file, older)
        writer.writeheader()
        writer.writerow(row | {"image_AUROC": 0.5})
    run_accuracy([config], output)
    assert len(rows_of(output)) == 1  # not run again
    append(output, row | {"model": "other", "protocol": "last", "teacher": "T"})
    assert [row["teacher"] for row in rows_of(output)] == ["", "T"]
    said = "last epoch, tested once. Teacher: not recorded (ours); T (other)."
    assert said in accuracy_table(read_accuracy(output))


@pytest.mark.parametrize("path", sorted((ROOT / "experiments/results").glob("*.csv")), ids=lambda path: path.stem)
def test_stored_results_are_read_whole(path):
    name = path.stem.split("_")[0]
    opened = {"latency": latency_results, "precision": precision_results}.get(name, accuracy_results)
    if name in ("curves", "steps", "analyses") or path.stem in ("gpu_steps", "transport", "ideas"):
        pytest.skip("not of the benchmark: tests/test_experiments.py has them")
    frame = opened(path).frame()
    lines = path.read_text().splitlines()
    assert len(opened(path).rows()) == len([line for line in lines if not line.startswith(("data,", "model,"))])
    assert not frame[frame["error"] == ""].empty


def test_row_that_begins_like_the_header_is_a_row(tmp_path):
    path = tmp_path / "rows.csv"
    row = {"data": "data", "seed": 0, "epochs": 1, "image_size": 64, "batch_size": 2}
    for model in ("data", "model"):
        append(path, row | {"model": model})
    path.write_text(path.read_text() * 2)  # joined by cat
    assert [(row["data"], row["model"]) for row in rows_of(path)] == [("data", "data"), ("data", "model")] * 2
    assert path.read_text().count("data,model,seed") == 2


def test_best_epoch_on_test_is_a_row_of_its_own_and_said(grid):
    config, output = grid([0], ours={**TOY, "epochs": 2})
    for best_on_test in (False, True, True):
        run_accuracy([config], output, best_on_test=best_on_test)
    last, best = rows_of(output)
    assert (last["protocol"], best["protocol"]) == ("last", "best on test")
    assert (best["error"], best["test_images"], best["steps"]) == ("", "8", "2")
    assert 0 <= float(best["pixel_AUPRO"]) <= 1
    assert "**best epoch on the test images**" in accuracy_table(read_accuracy(output))


@pytest.mark.slow
def test_runs_of_two_processes_are_one_row_each(grid):
    config, output = grid([0, 1], ours=TOY)
    change(config, trainer={"accelerator": "cpu", "devices": 2, "strategy": "ddp"})
    command = [sys.executable, "-m", "anomalib_rdpp.benchmark", "accuracy", str(config), "--output", str(output)]
    subprocess.run(command, check=True, timeout=600, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert [(row["seed"], row["error"], row["steps"]) for row in rows_of(output)] == [("0", "", "1"), ("1", "", "1")]


MALFORMED = {
    "no mapping": ("- a\n", "must be a mapping, got"),
    "empty": ("", "must be a mapping, got 'None'"),
    "broken": ("models: {a: [}\n", "is no YAML: while parsing"),
    "no text": (b"\xff\xfe\x00\xd8", "is no YAML"),
    "no model": ({"models": {}}, "models must be a mapping, got '{}'"),
    "too little": ("models: {}\n", "is no grid of the accuracy benchmark: it has no batch_size, data"),
    "seeds": ({"seeds": 0}, "seeds must be a list, got '0'"),
    "no seeds": ({"seeds": []}, "seeds must be a list, got '[]'"),
    "seed": ({"seeds": ["a"]}, "seeds, 1 must be a whole number, got 'a'"),
    "size": ({"image_size": "256px"}, "image_size must be a whole number above 0, got '256px'"),
    "batch": ({"batch_size": 0}, "batch_size must be a whole number above 0, got '0'"),
    "models": ({"models": ["a"]}, "models must be a mapping, got"),
    "model": ({"models": {"a": "Patchcore"}}, "models, a must be a mapping, got 'Patchcore'"),
    "no class": ({"models": {"a": {}}}, "models, a has no class_path"),
    "typo": ({"models": {"a": {**TOY, "epoch": 1}}}, "models, a has an unknown key 'epoch'"),
    "categories": ({"data": {"a": {**TOY, "categories": {"x": "y"}}}}, "a, categories, x must be a whole number above"),
    "no epochs": ({"data": {"a": TOY}}, "gives no epochs for ours on a"),
    "no file": ({"models": "none.yaml"}, "none.yaml"),
}


def error_of(capsys, *arguments):
    """Run a command that fails and give the one line that it says."""
    with pytest.raises(SystemExit) as left:
        main(list(map(str, arguments)))
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_malformed_grid_is_one_line(grid, capsys):
    for case, (content, message) in MALFORMED.items():
        config, output = grid([0], ours=TOY)
        if isinstance(content, dict):
            change(config, **content)
        else:
            config.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert message in error_of(capsys, "accuracy", config, "--output", output), case
        assert not output.exists()


def test_malformed_table_is_one_line(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    for content, message in (
        (
            b"data;model;seed\nmtd;RD;0\n",
            "is no table of `anomalib_rdpp.benchmark accuracy`: it begins with 'data;model",
        ),
        (b"PK\x03\x04\xff\xfe", "is no table of"),
        (b"model,backbone,precision\n", "it begins with 'model,backbone"),
        (
            b"data,model,seed,epochs,error\na,b,0,many,\n",
            "something else where `anomalib_rdpp.benchmark accuracy` writes n",
        ),
    ):
        path.write_bytes(content)
        assert message in error_of(capsys, "report", path)


def test_table_of_a_spreadsheet_with_its_mark_is_read(tmp_path):
    path = tmp_path / "rows.csv"
    append(path, {"data": "a", "model": "b", "seed": 0, "epochs": 1, "image_size": 64, "batch_size": 2})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_accuracy(path)) == 1


def test_data_and_models_may_stand_in_files(grid):
    config, _ = grid([0], ours=TOY)
    content = yaml.safe_load(config.read_text())
    for name in ("models", "data"):
        (config.parent / f"{name}.yaml").write_text(yaml.safe_dump(content[name]))
    change(config, models="models.yaml", data="data.yaml")
    assert accuracy.read_grid(config) == content


def test_help_has_what_the_docstring_says(capsys):
    for command in ("accuracy", "precision", "latency", "report", "gallery"):
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0
    assert "Folder of its CSV, where the checkpoints are." in " ".join(capsys.readouterr().out.split())


def test_shards_share_the_grid(grid):
    config, output = grid([0, 1, 2], broken=BROKEN)
    main(["accuracy", str(config), "--output", str(output), "--shard", "2/2"])
    assert [row["seed"] for row in rows_of(output)] == ["1"]
    run_accuracy([config], output, "1/2")
    assert sorted(row["seed"] for row in rows_of(output)) == ["0", "1", "2"]


@pytest.mark.parametrize("shard", ["3/2", "0/2", "2", "a/b"])
def test_bad_shard_is_named(shard):
    with pytest.raises(ValueError, match=f"1 <= i <= n, .* got '{shard}'"):
        run_accuracy([], Path("none.csv"), shard)


def test_report_without_rows_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="benchmark accuracy GRID"):
        read_accuracy(tmp_path / "none.csv")


def test_trained_models_are_drawn_and_tested_in_every_precision(grid, tmp_path, capsys):
    config, output = grid([0], ours=TOY)
    with pytest.raises(FileNotFoundError, match=r"benchmark accuracy"):
        run_gallery([config], output.parent, tmp_path / "gallery")
    run_accuracy([config], output)
    data = yaml.safe_load(config.read_text())["data"]["tiny"]
    second = shutil.copy(config, tmp_path / "second.yaml")
    change(second, data={"again": data})
    shutil.copytree(output.parent / "tiny", output.parent / "again")
    pictures = run_gallery([config, second], output.parent, tmp_path / "gallery")
    assert [path.name for path in pictures] == ["tiny.png", "again.png"]
    with pytest.raises(ValueError, match=r"Two grids have 'ours' on tiny: rename it in one grid"):
        run_gallery([config, config], output.parent, tmp_path / "gallery")
    change(second, data={"again": {**data, "test_every": 8}})
    with pytest.raises(ValueError, match=r"all 1 test images of again are (defects|normal): add the other kind"):
        run_gallery([second], output.parent, tmp_path / "gallery")

    path = tmp_path / "precision.csv"
    chosen = [name for name in PRECISIONS if has_bfloat16() or "bf16" not in name]
    options = ["--results", str(output.parent), "--output", str(path), "--data", "tiny", "--precisions", *chosen]
    main(["precision", str(config), *options])
    assert any("| tiny | 64 | ours | 0 | fp32 |" in line for line in cells(capsys.readouterr().out))
    rows = precision_results(path).rows()
    assert [(row["precision"], row["error"]) for row in rows] == [(name, "") for name in chosen]
    (trained,) = rows_of(output)
    for row in rows[:2]:
        for name in precision.METRICS:
            assert float(row[name]) == pytest.approx(float(trained[name]), abs=2e-3), name
    with pytest.raises(ValueError, match=r"Unknown 'int4'; choose of 'torch', 'fp32'"):
        run_precision(config, output.parent, path, precisions=["int4"])


def test_precision_that_fails_is_told_and_tried_again(grid, tmp_path, monkeypatch):
    config, output = grid([0], ours=TOY)
    path = tmp_path / "precision.csv"
    run_precision(config, output.parent, path, precisions=["torch", "int8"])
    rows = precision_results(path).rows()
    assert [row["precision"] for row in rows] == ["torch", "int8"]
    assert all("No trained model" in row["error"] for row in rows)
    path.unlink()
    monkeypatch.setattr(
        precision, "load_trained", lambda *_: SimpleNamespace(pre_processor=SimpleNamespace(transform=None))
    )
    monkeypatch.setattr(precision, "_in_precision", lambda _, name: 1 / 0 if name == "fp16" else None)
    monkeypatch.setattr(precision.Trained, "test", lambda *_: {})
    for _ in range(2):
        run_precision(config, output.parent, path, precisions=["fp16", "int8"])
    failed = "ZeroDivisionError: division by zero"
    found = [(row["precision"], row["error"]) for row in precision_results(path).rows()]
    assert found == [("fp16", failed), ("int8", ""), ("fp16", failed)]


def test_model_that_crops_is_tested_as_it_was_trained_and_its_row_says_what_it_saw(grid, tmp_path):
    config, output = grid([0], crops={"class_path": "benchmark_toy.CroppingToy"})
    run_accuracy([config], output)
    (trained,) = rows_of(output)
    assert (trained["error"], trained["image_size"], trained["input_size"]) == ("", "64", "32")
    assert any("| 64 (sees 32 px) | crops |" in line for line in cells(accuracy_table(read_accuracy(output))))
    run_precision(config, output.parent, tmp_path / "precision.csv", precisions=["torch", "fp32"])
    for tested in precision_results(tmp_path / "precision.csv").rows():
        assert (tested["error"], tested["input_size"]) == ("", "32")
        for name in precision.METRICS:
            assert float(tested[name]) == pytest.approx(float(trained[name]), abs=2e-3), name


def test_model_has_the_image_size_of_its_entry(grid):
    config, output = grid([0], small={**TOY, "image_size": 32})
    run_accuracy([config], output)
    (row,) = rows_of(output)
    assert (row["error"], row["image_size"], row["input_size"]) == ("", "64", "32")


@pytest.fixture
def timed(tmp_path):
    """Write a grid of latency and say where."""

    def write(models, **keys):
        grid = {"image_size": 64, "rounds": 2, "threads": [1], "precisions": ["fp32"], "backbones": ["resnet18"]}
        (tmp_path / "times.yaml").write_text(yaml.safe_dump({**grid, "models": models, **keys}))
        return tmp_path / "times.yaml", tmp_path / "times.csv"

    return write


def test_latency_of_a_model_of_ones_own_is_measured_and_a_broken_one_told(timed, tmp_path, monkeypatch, capsys):
    import benchmark_toy

    lost = {**TOY, "ckpt_path": str(tmp_path / "none.ckpt")}
    config, output = timed({"toy": {**TOY, "fill": "benchmark_toy.fill", "bank": 7}, "broken": BROKEN, "lost": lost})
    wanted = ["torch", "bf16", "int8"]
    left = [name for name in wanted if has_bfloat16() or name != "bf16"]
    monkeypatch.setattr(benchmark_toy, "FILLED", [])
    main(["latency", str(config), "--output", str(output), "--precisions", *wanted])
    assert benchmark_toy.FILLED == [("Toy", 7, 64)]
    rows = latency_results(output).rows()
    told = [(row["model"], row["precision"]) for row in rows if row["error"]]
    assert told == [(model, precision) for model in ("broken", "lost") for precision in left]
    measured = [row for row in rows if not row["error"]]
    assert [(row["model"], row["precision"]) for row in measured] == [("toy", precision) for precision in left]
    assert all(float(row["median_ms"]) > 0 and float(row["peak_mib"]) > 0 for row in measured)
    assert "FakeQuantize" in next(tmp_path.rglob("int8.xml")).read_text()
    row = {"data": "a", "model": "b", "seed": 0, "epochs": 1, "image_size": 64, "batch_size": 2}
    append(tmp_path / "rows.csv", row)
    main(["report", str(tmp_path / "rows.csv"), "--latency", str(output)])
    table = cells(capsys.readouterr().out)
    assert any(line.startswith("| toy | 0.0 |") for line in table)
    assert any(f"| broken | - | {' | '.join(['failed'] * len(left))} | - |" in line for line in table)

    monkeypatch.setattr(latency, "_probe", lambda *_: {})
    results = latency_results(tmp_path / "more.csv")
    known = {name: measured[0][name] for name in ("model", "backbone", "precision", "image_size")}
    candidates = [(known, path, "f32", 64) for path in (config, next(tmp_path.rglob("model.xml")))]
    latency._measure(candidates, 1, 1, 60.0, results)
    assert [bool(row["error"]) for row in results.rows()] == [True, False]


def test_latency_of_a_model_with_an_input_of_its_own_says_so(timed, monkeypatch):
    monkeypatch.setattr(latency, "_probe", lambda *_: {})
    config, output = timed({"crops": {"class_path": "benchmark_toy.CroppingToy"}})
    run_latency(config, output)
    (row,) = latency_results(output).rows()
    assert (row["error"], row["image_size"], row["input_size"]) == ("", "64", "32")
    assert any(
        line.startswith("| crops (sees 32 px) |") for line in cells(latency_table(latency_results(output).frame()))
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["anomalib_rdpp.RDPP", "Patchcore", "MHPatchcore", "Cfa", "Padim", "Stfpm"])
def test_latency_of_ours_and_of_anomalibs_models_is_measured(timed, name):
    precisions = ["torch", "int8"]
    config, output = timed({name: {"class_path": name, "bank": 20}}, precisions=precisions, image_size=256)
    run_latency(config, output)
    assert [(row["precision"], row["error"]) for row in latency_results(output).rows()] == [("torch", ""), ("int8", "")]


@pytest.mark.parametrize(
    ("name", "size", "bank"),
    [("Patchcore", 64, "20 x 384"), ("Cfa", 64, "256 x 448"), ("Padim", 64, ""), ("MHPatchcore", 224, "20 x 690")],
)
def test_what_training_fills_is_filled(name, size, bank):
    entry = {"class_path": f"anomalib.models.{name}", "bank": 20}
    model = build_filled(entry, "resnet18", size)
    with torch.no_grad():
        answer = model(torch.rand(1, 3, size, size))
    assert answer.anomaly_map.shape[-2:] == (size, size)
    assert answer.pred_score.isfinite().all()
    assert bank_of(model) == bank


def test_bank_that_a_grid_leaves_out_is_asked_for():
    with pytest.raises(ValueError, match=r"anomalib\.models\.Patchcore needs `bank`"):
        build_filled({"class_path": "anomalib.models.Patchcore"}, "resnet18", 64)


def test_ratios_are_told_without_and_with_bfloat16(tmp_path):
    results = latency_results(tmp_path / "rows.csv")
    fixed = {"backbone": "resnet18", "threads": 2, "image_size": 256, "rounds": 3, "gmac": 1}
    for model, way, median in (
        ("RD++", "fp32", 4),
        ("RD++", "int8", 2),
        ("RD++", "int8, bf16", 1),
        ("PatchCore", "fp32", 9),
        ("PatchCore", "bf16", 5),
    ):
        times = dict.fromkeys(("median_ms", "p10_ms", "p90_ms"), median)
        facts = {"file_mib": 7 if way == "int8" else 0, "first_result_ms": 8, "peak_mib": 9}
        results.append({"model": model, "precision": way, **fixed, **times, **facts})
    table = cells(latency_table(results.frame()))[2:]
    assert table[0].endswith("| x RD++ int8 | with bf16 |")
    assert table[2].endswith("| 8 | 9 | 7 | 1.0 | 0.5 |"), "first result, memory and file are those of int8"
    assert table[3].endswith("| 4.5 | 2.5 |")


def test_grid_that_latency_cannot_take_is_refused(timed, monkeypatch):
    stored = {"stored": {**TOY, "ckpt_path": "model.ckpt"}}
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "INT8"])
    for models, keys, message in (
        ({"ours": TOY}, {"precisions": ["int4"]}, r"Unknown 'int4'; choose of 'torch', .*'int8, bf16'"),
        (stored, {"backbones": ["resnet18", "resnet34"]}, r"but stored would be measured with each of resnet18, res"),
        ({"ours": TOY}, {"precisions": ["bf16"]}, r"Nothing is left to measure: this CPU has no bfloat16"),
        ({"ours": TOY}, {"threads": 2}, r"threads must be a list, got '2'"),
    ):
        config, output = timed(models, **keys)
        with pytest.raises(ValueError, match=message):
            run_latency(config, output)
    config.write_text(yaml.safe_dump({"models": {"ours": TOY}, "image_size": 64}))
    with pytest.raises(ValueError, match=r"times.yaml' is no grid of the latency benchmark: it has no backbones, p"):
        run_latency(config, output)


def test_export_of_a_checkpoint_that_changed_is_not_taken(tmp_path):
    path = tmp_path / "model.ckpt"
    entry = {**TOY, "ckpt_path": str(path)}
    digests = [latency._digest(entry) for text in ("one", "other") if path.write_text(text)]
    assert digests[0] != digests[1]
    assert latency._digest(entry) == digests[1]


def test_model_of_an_unfinished_run_is_not_taken(grid):
    config, output = grid([0], ours=TOY)
    run_accuracy([config], output)
    content = yaml.safe_load(config.read_text())
    assert load_trained(content, "tiny", "ours", 0, output.parent)
    content["models"]["ours"] = {**TOY, "init_args": {"width": 5}}
    with pytest.raises(ValueError, match=r"is of another model than the grid's ours"):
        load_trained(content, "tiny", "ours", 0, output.parent)
    folder = output.parent / "tiny" / "ours"
    (folder / "64px_batch2_1epochs_seed0").rename(folder / "64px_batch2_5epochs_seed0")
    content["data"]["tiny"]["epochs"] = 5
    with pytest.raises(FileNotFoundError, match="No trained model"):
        load_trained(content, "tiny", "ours", 0, output.parent)


def test_wheel_takes_no_grid_and_nothing_that_names_our_images():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    hatch_build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hatch_build)
    data = {"force_include": {}, "force_include_editable": {}}
    hatch_build.PlaceFiles.initialize(SimpleNamespace(root=str(ROOT)), "standard", data)
    files = [Path(path) for path in data["force_include"]]
    assert {path.name for path in files} >= {"rdpp.yaml", "aand.yaml", "anomalib_rdpp_autoload.py"}
    assert not [path for path in files if "benchmark" in str(path.relative_to(ROOT))]
    files += (ROOT / "anomalib_rdpp").rglob("*.py")
    assert not [path for path in files if "../shared" in path.read_text()]
