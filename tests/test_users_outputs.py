"""What a user sees and gets: quiet exports that say what is inside, scores in pictures and in a table."""

import csv
import json
import logging

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.data.utils import read_image
from anomalib.post_processing import PostProcessor
from anomalib.visualization import ImageVisualizer
from PIL import Image
from tiny import build, engine

from anomalib_rdpp.visualizer import ScoreVisualizer


@pytest.fixture(scope="module")
def validated(make_tiny_data, tmp_path_factory):
    """A model with thresholds."""
    model = build("RDPP")
    engine(tmp_path_factory.mktemp("validated")).validate(model, datamodule=make_tiny_data())
    return model


def test_export_says_a_handful_of_lines_and_gives_facts(validated, make_tiny_data, tmp_path, capfd, caplog):
    with caplog.at_level("INFO"):
        path = validated.to_openvino(tmp_path, compression_type="int8_ptq", datamodule=make_tiny_data())
    said = capfd.readouterr()
    assert len((said.out + said.err + caplog.text).splitlines()) < 10, said.out + said.err + caplog.text
    assert logging.getLogger("nncf").level == logging.INFO, "as before"
    network = ov.Core().read_model(path)
    facts = json.loads((path.parent / "metadata.json").read_text())
    for name, value in facts.items():
        assert network.get_rt_info(["anomalib_rdpp", name]).astype(str) == str(value)
    assert facts["method"] == "RD++"
    assert facts["scores"] == "0.5 is the threshold"
    assert facts["teacher"] == "test_resnet"
    assert facts["image_threshold"] == pytest.approx(float(validated.post_processor.image_threshold))


def test_facts_name_the_threshold_of_a_chosen_sensitivity():
    model = build("RDPP", post_processor=PostProcessor(image_sensitivity=0.8))
    assert model.facts()["scores"] == "0.2 is the threshold"


def test_threshold_can_be_changed_after_export(validated, tiny_folder, tmp_path):
    """By the lines of docs/edge.md: the raw threshold, as scores of the exported model."""
    facts = json.loads(validated.to_torch(tmp_path).with_name("metadata.json").read_text())
    threshold = 1.02 * facts["image_threshold"]
    applied = (threshold - facts["image_threshold"]) / (facts["image_max"] - facts["image_min"]) + 0.5
    with torch.no_grad():
        for file in sorted(tiny_folder.glob("test/*/*.png")):
            image = read_image(file, as_tensor=True)[None]
            raw = validated.eval().model(validated.pre_processor(image)).pred_score
            assert bool(raw > threshold) == bool(validated(image).pred_score > applied)


def test_predict_writes_scores_into_a_table_and_the_picture(validated, tiny_folder, tmp_path):
    validated.visualizer = ScoreVisualizer(fields=["image"])
    found = engine(tmp_path).predict(validated, dataset=PredictDataset(tiny_folder / "test"))
    [table] = tmp_path.rglob("scores.csv")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [batch.image_path[0] for batch in found]
    for row, batch in zip(rows, found, strict=True):
        assert float(row["score"]) == pytest.approx(float(batch.pred_score), abs=1e-4)
        assert bool(int(row["label"])) == bool(batch.pred_label)
        assert float(row["threshold"]) == 0.5
    pictures = sorted(table.parent.rglob("*.png"))
    assert len(pictures) == len(rows)
    plain = ImageVisualizer(fields=["image"])(found[0])
    titled = Image.open(next(path for path in pictures if path.stem == "0"))
    assert titled.size == plain.size
    assert np.abs(np.asarray(titled.convert("RGB"), int) - np.asarray(plain.convert("RGB"), int)).any()


def test_models_draw_scores_by_default_and_not_if_told():
    assert isinstance(build("RDPP", visualizer=True).visualizer, ScoreVisualizer)
    assert build("RDPP", visualizer=False).visualizer is None


def test_images_of_the_same_name_keep_their_pictures_and_a_test_its_table(validated, tmp_path, make_tiny_data):
    validated.visualizer = ScoreVisualizer(fields=["image"])
    runs = engine(tmp_path)
    runs.test(validated, datamodule=make_tiny_data())
    for i, folder in enumerate(("cam1/a", "cam2/a")):
        (tmp_path / "new" / folder).mkdir(parents=True)
        Image.new("RGB", (64, 64), (i * 90,) * 3).save(tmp_path / "new" / folder / "0.png")
    runs.predict(validated, data_path=tmp_path / "new")
    [folder] = {path.parent for path in tmp_path.rglob("scores*.csv")}
    tables = {path.name: list(csv.DictReader(path.open())) for path in folder.glob("scores*.csv")}
    assert {name: len(rows) for name, rows in tables.items()} == {"scores.csv": 2, "scores_1.csv": 4}
    pictures = [row["picture"] for rows in tables.values() for row in rows]
    assert len(set(pictures)) == 6
    assert all((folder / picture).is_file() for picture in pictures)
