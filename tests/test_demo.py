"""The demo: its images, and itself from end to end."""

import csv
import hashlib

import numpy as np
import pytest
from anomalib.data import Folder
from PIL import Image

from anomalib_rdpp.demo.__main__ import TOLERANCE, main, run_demo
from anomalib_rdpp.demo.surfaces import DEFECTS, VISIBLE, make_surfaces, photograph


def _contents(root):
    return {path.relative_to(root): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*.png")}


def _draw(seed, defect=None, size=96):
    image, mask = photograph(np.random.default_rng(seed), size, defect)
    return image.astype(float) / 255, mask


def test_same_seed_gives_same_bytes_and_another_seed_other_ones(tmp_path):
    for name, seed in (("first", 3), ("second", 3), ("other", 4)):
        make_surfaces(tmp_path / name, train=2, good=1, defective=5, size=64, seed=seed)
    first, second, other = (_contents(tmp_path / name) for name in ("first", "second", "other"))
    assert first == second
    assert first.keys() == other.keys()
    assert not set(first.values()) & set(other.values())


def test_no_two_images_of_a_data_set_are_the_same(tmp_path):
    make_surfaces(tmp_path, train=4, good=4, defective=5, size=64)
    images = [value for path, value in _contents(tmp_path).items() if path.parts[0] != "ground_truth"]
    assert len(set(images)) == len(images) == 13


@pytest.mark.parametrize("defect", DEFECTS)
def test_mask_covers_the_changed_pixels_and_hardly_more(defect):
    for seed in range(3):
        faultless, nothing = _draw(seed)
        # Same seed, same cloth: all draws of the defect come after those of the cloth and the light.
        damaged, mask = _draw(seed, defect)
        changed = np.abs(damaged - faultless).max(axis=-1)
        assert not nothing.any()
        assert set(np.unique(mask)) == {0, 255}
        assert mask[changed > VISIBLE + 1 / 255].all()
        assert (changed[mask > 0] > VISIBLE - 1 / 255).mean() > 0.6  # the rest lies between threads of the defect
        assert 0.001 < (mask > 0).mean() < 0.12


def test_folder_reads_the_layout(tmp_path):
    make_surfaces(tmp_path, train=2, good=2, defective=5, size=64)
    data = Folder(
        name="cloth",
        root=tmp_path,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir=[f"test/{defect}" for defect in DEFECTS],
        mask_dir=[f"ground_truth/{defect}" for defect in DEFECTS],
        val_split_mode="none",
        num_workers=0,
    )
    data.setup()
    batch = next(iter(data.test_dataloader()))
    assert len(data.train_data) == 2
    assert batch.image.shape == (7, 3, 64, 64)
    assert (batch.gt_mask.flatten(1).any(dim=1) == batch.gt_label).all()


@pytest.mark.parametrize("wrong", [{"train": 0}, {"good": 0}, {"defective": 4}, {"size": 32}])
def test_too_small_a_data_set_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"A data set needs .* got train="):
        make_surfaces(tmp_path, **wrong)


def test_demo_runs_from_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("anomalib_rdpp.demo.teacher.CANDIDATES", ("test_resnet",))
    results = run_demo(tmp_path, epochs=1, size=64, train=8, test=16, pre_trained=False)
    printed = capsys.readouterr().out
    assert "RANDOM TEACHER" in printed
    assert str(tmp_path / "heat_maps") in printed
    assert results["OpenVINO - torch"] <= TOLERANCE
    assert (results["test images"], results["images for thresholds"]) == (16, 8)
    assert 0 <= results["image AUROC"] <= 1
    assert Image.open(tmp_path / "heat_maps" / "overview.png").size == (900, 450)
    with (tmp_path / "results.csv").open(newline="") as file:
        assert [name for name, _ in csv.reader(file)] == list(results)


def test_demo_refuses_bad_arguments(tmp_path, capsys):
    (tmp_path / "file").touch()
    for arguments, complaint in (
        (["--seed", "-1"], "--seed takes a number from 0"),
        (["--output", str(tmp_path / "file")], "is a file"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert complaint in capsys.readouterr().err
