"""Exported graphs answer as the Engine does, on files of any size and in INT8."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino as ov
import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import Folder, PredictDataset
from anomalib.data.utils import read_image
from anomalib.deploy import OpenVINOInferencer
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from PIL import Image
from tiny import TINY, build
from torchvision.transforms.v2 import InterpolationMode, Resize

from anomalib_rdpp import RDPP
from anomalib_rdpp.export import map_operations
from anomalib_rdpp.resize import resize_as_torch

PHOTOGRAPH = Path(__file__).parent / "cases" / "texture_576x768.jpg"
FOLDER = {"name": "tiny", "normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/square"}


def compiled(network):
    """In single precision, where OpenVINO takes bfloat16 by itself if the CPU has it."""
    return ov.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


@pytest.fixture(scope="module")
def checkpoint(tiny_folder, tmp_path_factory):
    """RD++ as a cascade after two steps at 64 px, with scores as they are."""
    raw = PostProcessor(enable_normalization=False)
    model = build("RDPP", student="cascade", score="standardised", post_processor=raw)
    data = Folder(root=tiny_folder, train_batch_size=3, num_workers=0, seed=0, **FOLDER)
    engine = Engine(max_epochs=1, accelerator="cpu", devices=1, default_root_dir=tmp_path_factory.mktemp("trained"))
    engine.fit(model, datamodule=data)
    return engine.best_model_path


@pytest.fixture(scope="module")
def opened():
    """Names of the files that were opened as images."""
    paths, open_image = [], Image.open

    def note(path, *more, **named):
        paths.append(Path(path))
        return open_image(path, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", note)
        yield paths


@pytest.fixture(scope="module")
def int8(checkpoint, tiny_folder, tmp_path_factory, opened):  # noqa: ARG001  from before on
    """INT8_PTQ by anomalib's command line, for any size."""
    root = tmp_path_factory.mktemp("int8")
    data = [f"--data.{name}={value}" for name, value in {**FOLDER, "root": tiny_folder, "num_workers": 0}.items()]
    model = ["--model", "RDPP", "--model.backbone", TINY["backbone"], "--model.pre_trained", "false"]
    model += ["--ckpt_path", checkpoint]
    kind = ["--export_type", "openvino", "--compression_type", "INT8_PTQ", "--export_root", str(root)]
    AnomalibCLI(args=["export", *model, *kind, "--data", "anomalib.data.Folder", *data])
    return root / "weights" / "openvino" / "model.xml"


@pytest.fixture(scope="module")
def fixed_int8(checkpoint, tiny_folder, tmp_path_factory):
    """INT8_PTQ with a batch of four, 128 x 96."""
    model = RDPP.load_from_checkpoint(checkpoint)
    model.pre_processor = RDPP.configure_pre_processor((128, 96))
    return Engine(accelerator="cpu", devices=1, default_root_dir=tmp_path_factory.mktemp("fixed")).export(
        model,
        "openvino",
        input_size=(128, 96),
        compression_type="int8_ptq",
        datamodule=Folder(root=tiny_folder, num_workers=0, **FOLDER),
        ov_kwargs={"input": [4, 3, 128, 96]},
    )


def test_int8_calibrates_on_training_images(int8, opened, tiny_folder):
    assert int8.is_file()
    read = {path.parent for path in opened}
    assert tiny_folder / "train/good" in read
    assert not any(tiny_folder / "test" in folder.parents for folder in read), "test images stay unseen"


@pytest.mark.parametrize(("kind", "size", "batch"), [("int8", (64, 64), 1), ("fixed_int8", (128, 96), 4)])
def test_int8_keeps_map_in_float_and_the_score_of_a_defect(kind, size, batch, request, checkpoint, tiny_folder):
    network = ov.Core().read_model(request.getfixturevalue(kind))
    operations = {operation.get_friendly_name(): operation for operation in network.get_ops()}
    assert "FakeQuantize" in {operation.get_type_name() for operation in operations.values()}
    in_float = map_operations(network)
    assert any(operations[name].get_type_name() == "MatMul" for name in in_float)
    assert not any(operations[name].get_type_name() == "FakeQuantize" for name in in_float)
    model = RDPP.load_from_checkpoint(checkpoint).eval()
    model.pre_processor = RDPP.configure_pre_processor(size)
    image = read_image(tiny_folder / "test/square/0.png", as_tensor=True)[None]
    given = image if batch == 1 else Resize(size)(image).expand(batch, -1, -1, -1)
    with torch.no_grad():
        exact = float(model(image).pred_score)
    np.testing.assert_allclose(compiled(network)(given.numpy())["pred_score"], [exact] * batch, rtol=0.01)


def test_int8_takes_a_photograph_as_it_is(int8, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the inferencer puts its cache
    answer = OpenVINOInferencer(int8, "CPU").predict(PHOTOGRAPH)
    assert answer.anomaly_map.squeeze().shape == (64, 64)


def test_onnx_and_openvino_answer_as_the_engine_does_on_any_size(checkpoint, tiny_folder, tmp_path):
    model = RDPP.load_from_checkpoint(checkpoint)
    Image.open(PHOTOGRAPH).crop((0, 0, 41, 57)).save(tmp_path / "small.png")
    engine = Engine(accelerator="cpu", devices=1, default_root_dir=tmp_path)
    path = model.to_onnx(tmp_path)
    facts = json.loads((path.parent / "metadata.json").read_text())
    assert {each.key for each in onnx.load(path, load_external_data=False).metadata_props} >= set(facts)
    session = onnxruntime.InferenceSession(path)
    network = compiled(resize_as_torch(ov.Core().read_model(path)))  # what to_openvino stores
    for file in (PHOTOGRAPH, tmp_path / "small.png", tiny_folder / "test/square/0.png"):
        expected = engine.predict(model, dataset=PredictDataset(file))[0]
        image = read_image(file, as_tensor=True)[None]
        with torch.no_grad():
            direct = model.eval()(image)
        answers = {"torch": (direct.pred_score, direct.anomaly_map)}
        answers["onnx"] = session.run(["pred_score", "anomaly_map"], {"input": image.numpy()})
        found = network(image.numpy())
        answers["openvino"] = found["pred_score"], found["anomaly_map"]
        for name, (score, anomaly_map) in answers.items():
            where = f"{name}, {file}"
            np.testing.assert_allclose(
                np.squeeze(anomaly_map), expected.anomaly_map.squeeze(), atol=1e-3, err_msg=where
            )
            np.testing.assert_allclose(np.squeeze(score), expected.pred_score.squeeze(), atol=1e-3, err_msg=where)


@pytest.mark.parametrize("mode", [InterpolationMode.BILINEAR, InterpolationMode.BICUBIC])
def test_openvino_resizes_as_torch_does(mode, tmp_path):
    resize = Resize((64, 96), mode)
    dynamic = torch.export.Dim.DYNAMIC
    torch.onnx.export(
        torch.nn.Sequential(resize, torch.nn.ReLU()).eval(),
        (torch.rand(2, 3, 70, 80),),
        tmp_path / "resize.onnx",
        dynamo=True,
        opset_version=18,
        dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
    )
    network = compiled(resize_as_torch(ov.Core().read_model(tmp_path / "resize.onnx")))
    for sides in ((300, 400), (64, 96), (30, 97)):
        images = torch.rand(1, 3, *sides)
        np.testing.assert_allclose(network(images.numpy())[0], resize(images).relu(), atol=1e-4)


@pytest.mark.slow
def test_no_label_of_cookie_flips(tmp_path):
    root = Path(__file__).parents[2] / "shared" / "data" / "cookie"
    if not root.is_dir():
        pytest.skip("the photographs of cookie are not here (../shared/data/cookie)")
    data = Folder(
        name="cookie",
        root=root,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir="test/broken",
        val_split_mode="same_as_test",
        num_workers=0,
    )
    model = RDPP("resnet18", pre_trained=False, pre_processor=RDPP.configure_pre_processor((64, 64)))
    engine = Engine(accelerator="cpu", devices=1, default_root_dir=tmp_path)
    engine.validate(model, datamodule=data)
    network = compiled(model.to_openvino(tmp_path))
    for path in sorted(root.glob("test/*/*")):
        expected = engine.predict(model, dataset=PredictDataset(path))[0]
        answer = network(read_image(path, as_tensor=True)[None].numpy())
        np.testing.assert_allclose(answer["pred_score"], expected.pred_score, atol=1e-4, err_msg=str(path))
        if abs(float(expected.pred_score) - 0.5) > 1e-4:  # the threshold is some image's own score, to the last digits
            assert bool(answer["pred_label"][0]) == bool(expected.pred_label), path
        assert (
            np.quantile(np.abs(answer["anomaly_map"].squeeze() - expected.anomaly_map.squeeze().numpy()), 0.99) < 0.02
        )
