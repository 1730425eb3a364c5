"""The accuracy benchmark: rows written once, failures told, parts of data, shards."""

import csv

import pytest
import yaml

from anomalib_rdpp.benchmark.accuracy import read_rows, run_accuracy
from anomalib_rdpp.benchmark.report import accuracy_table

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
    broken, ours = read_rows(output)
    assert "Nothing" in broken["error"]
    assert ours["error"] == ""
    assert 0 <= float(ours["image_AUROC"]) <= 1
    assert (ours["train_images"], ours["test_images"], ours["steps"]) == ("2", "8", "1")
    table = accuracy_table(output)
    assert "| tiny | broken | 0 (1 failed) |" in table
    assert "| tiny | ours | 1 |" in table


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
    assert sorted(row["seed"] for row in read_rows(output)) == ["0", "1", "2"]


def test_bad_shard_is_named(grid):
    with pytest.raises(ValueError, match="1 <= i <= n, got 3/2"):
        run_accuracy(*grid([0]), (3, 2))


def test_report_without_rows_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="benchmark accuracy CONFIG"):
        accuracy_table(tmp_path / "none.csv")
