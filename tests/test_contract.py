"""What anomalib's own integration tests ask of a model, for each of ours: one training, of which all else is asked."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openvino as ov
import pandas as pd
import pytest
import torch
import yaml
from anomalib.callbacks import ModelCheckpoint
from anomalib.cli import AnomalibCLI
from anomalib.data import ImageBatch
from anomalib.deploy import CompressionType, ExportType, OpenVINOInferencer, TorchInferencer
from PIL import Image
from tiny import FOLDERS, MODELS, TINY, build, engine

PHOTOGRAPH = Path(__file__).parent / "cases/texture_576x768.jpg"
CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
TINY_OPTIONS = [text for name, value in TINY.items() for text in (f"--model.{name}", str(value).lower())]


@pytest.fixture(params=MODELS, scope="module")
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def trained(name, make_tiny_data, tmp_path_factory) -> SimpleNamespace:
    """A model as ``anomalib train`` leaves it: trained two epochs of two steps, tested, with pictures."""
    folder, data = tmp_path_factory.mktemp(name), make_tiny_data()
    saving = ModelCheckpoint(folder, filename="model", enable_version_counter=False)
    model, run = build(name, visualizer=True), engine(folder, saving)
    metrics = run.train(model, datamodule=data)[0]
    return SimpleNamespace(model=model, data=data, metrics=metrics, folder=folder, path=folder / "model.ckpt")


def a_defect(data) -> Path:
    return next(iter((Path(data.root) / "test/square").glob("*.png")))


def test_training_ends_with_metrics_and_pictures(trained):
    assert {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"} <= trained.metrics.keys()
    assert list(trained.folder.rglob("images/**/*.png")), "the visualizer writes heat maps"


def test_predictions_are_whole(trained, tmp_path):
    run = engine(tmp_path)
    run.validate(trained.model, datamodule=trained.data)
    batch = run.predict(trained.model, datamodule=trained.data)[0]
    assert isinstance(batch, ImageBatch)
    assert batch.anomaly_map.shape == (3, 64, 64)
    assert batch.pred_score.shape == (3,)
    assert batch.pred_mask.dtype == torch.bool


def test_checkpoint_tests_alike(trained, name, tmp_path):
    again = engine(tmp_path).test(build(name), datamodule=trained.data, ckpt_path=trained.path)
    assert again[0] == pytest.approx(trained.metrics, abs=1e-6)


def test_checkpoint_reloads_weights_only_and_answers_alike(trained):
    reloaded = type(trained.model).load_from_checkpoint(trained.path, weights_only=True)
    images = torch.rand(2, 3, 80, 96)
    for ours, theirs in zip(trained.model.eval()(images), reloaded.eval()(images), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_resumed_training_goes_on(trained, name, tmp_path):
    run, model = engine(tmp_path, max_epochs=3), build(name)
    run._setup_trainer(model)  # Engine.fit takes no weights_only
    run.trainer.fit(model, datamodule=trained.data, ckpt_path=trained.path, weights_only=True)
    assert run.trainer.current_epoch == 3
    assert run.trainer.global_step == 6


# -- exports


def randomized(name, size=(64, 64), **arguments):
    """Build a model whose BatchNorm statistics and thresholds are unlike their initial values, as after training."""
    model, generator = build(name, size, **arguments), torch.Generator().manual_seed(0)
    for key, value in model.model.student.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif key.endswith("running_mean"):
            # Larger ones leave a random student that answers 0 everywhere.
            value.uniform_(-0.2, 0.2, generator=generator)
    if model.post_processor is not None:
        state = {"image_min": 0.0, "image_max": 6.0, "pixel_min": 0.0, "pixel_max": 6.0}
        state |= {"_image_threshold": 3.0, "_pixel_threshold": 2.0}
        model.post_processor.load_state_dict({key: torch.tensor(value) for key, value in state.items()}, strict=False)
    return model.eval()


@pytest.mark.parametrize(
    "size",
    [(96, 160), pytest.param((64, 64), marks=pytest.mark.slow), pytest.param((128, 128), marks=pytest.mark.slow)],
)
def test_onnx_and_openvino_answer_as_torch_does(name, size, tmp_path):
    import onnxruntime

    torch.manual_seed(0)
    model = randomized(name, size, post_processor=False)  # raw maps: normalised ones are clamped
    onnx = model.to_onnx(tmp_path, input_size=size)
    session = onnxruntime.InferenceSession(str(onnx))
    compiled = ov.Core().compile_model(str(onnx), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (1, 4):
        images = torch.rand(batch, 3, *size)
        with torch.no_grad():
            expected = model(images)._asdict()
        names = [output.name for output in session.get_outputs()]
        answers = dict(zip(names, session.run(None, {"input": images.numpy()}), strict=True))
        for answer in (answers, {out.any_name: value for out, value in compiled(images.numpy()).items()}):
            for key in ("anomaly_map", "pred_score"):
                difference = np.abs(answer[key] - expected[key].numpy()).max()
                assert difference <= 1e-4 * float(np.ptp(expected["anomaly_map"].numpy())), key


# Slow is what anomalib's command exports above and tests/test_users_export.py (INT8 by Engine and by command) and
# tests/test_export.py (INT8 of both models) have. anomalib's INT8_ACQ fails with a last batch of one image.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "compression"),
    [
        *((name, compression) for name in MODELS for compression in (None, CompressionType.INT8_PTQ)),
        ("RDPP", CompressionType.FP16),
        ("RDPP", CompressionType.INT8),
    ],
)
def test_engine_exports_openvino_that_the_inferencer_reads(name, tiny_data, tmp_path, compression, monkeypatch):
    compressed = {"compression_type": compression, "datamodule": tiny_data}
    path = engine(tmp_path).export(randomized(name), ExportType.OPENVINO, **compressed)
    monkeypatch.chdir(tmp_path)  # the inferencer keeps its cache where it runs
    assert_whole(OpenVINOInferencer(path).predict(a_defect(tiny_data)))


def assert_whole(prediction):
    assert np.isfinite(prediction.anomaly_map).all()
    assert 0 <= float(np.squeeze(prediction.pred_score)) <= 1


def test_engine_exports_torch_that_the_inferencer_reads(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    path = engine(tmp_path).export(trained.model.eval(), ExportType.TORCH)
    image = a_defect(trained.data)
    prediction = TorchInferencer(path, device="cpu").predict(image)
    pixels = torch.from_numpy(np.asarray(Image.open(image).convert("RGB")) / np.float32(255)).permute(2, 0, 1)[None]
    expected = trained.model(pixels).anomaly_map.squeeze()
    torch.testing.assert_close(prediction.anomaly_map.squeeze(), expected, atol=1e-4, rtol=0)


# -- the command line


def folder_options(root):
    options = {"name": "tiny", "root": root, **FOLDERS, "num_workers": 0}
    given = [text for key, value in options.items() for text in (f"--data.init_args.{key}", str(value))]
    return ["--data", "anomalib.data.Folder", *given]


def test_command_trains_by_name(tiny_folder, tmp_path):
    """In a process of its own, as typed."""
    command = [
        Path(sys.executable).with_name("anomalib"), "train", "--model", "RDPP", *TINY_OPTIONS,
        *folder_options(tiny_folder), "--trainer.max_epochs", 1, "--trainer.accelerator", "cpu",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert list(tmp_path.rglob("*.ckpt"))


@pytest.fixture(scope="module")
def exported(trained, name, tmp_path_factory) -> Path:
    """The OpenVINO model that ``anomalib export`` makes of what was trained."""
    folder = tmp_path_factory.mktemp("exported")
    target = ["--export_type", "openvino", "--ckpt_path", str(trained.path), "--default_root_dir", str(folder)]
    AnomalibCLI(args=["export", "--model", name, *TINY_OPTIONS, *target])
    return next(folder.rglob("model.xml"))


def test_command_line_exports_what_the_inferencer_reads(exported, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the inferencer keeps its cache where it runs
    assert_whole(OpenVINOInferencer(exported).predict(a_defect(trained.data)))


def test_command_line_exports_what_was_trained_for_any_size(exported, trained):
    compiled = ov.Core().compile_model(exported, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with Image.open(PHOTOGRAPH) as photograph:
        small = photograph.crop((0, 0, 41, 57))
        for image in (photograph, small, Image.open(a_defect(trained.data))):
            pixels = torch.from_numpy(np.asarray(image.convert("RGB")) / np.float32(255)).permute(2, 0, 1)[None]
            with torch.no_grad():
                expected = trained.model.eval()(pixels)
            answer = compiled(pixels.numpy())
            for key in ("anomaly_map", "pred_score"):
                np.testing.assert_allclose(answer[key], getattr(expected, key), atol=1e-3, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "backbone", ["mobilenetv4_conv_small", "tf_efficientnet_lite0", "hgnetv2_b0", "convnext_atto", "test_resnet"]
)
def test_edge_teachers_train_test_and_export_to_int8_by_command(backbone, name, tiny_folder, tmp_path):
    model = ["--model", name, "--model.backbone", backbone, "--model.pre_trained", "false"]
    folders = [text for key, value in FOLDERS.items() for text in (f"--data.{key}", value)]
    data = ["--data", "Folder", "--data.name", "tiny", "--data.root", str(tiny_folder), "--data.num_workers", "0"]
    data += [*folders, "--data.seed", "0", "--data.train_batch_size", "3"]
    place = ["--default_root_dir", str(tmp_path)]
    AnomalibCLI(args=["train", *model, *data, *place, "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"])
    path = str(next(tmp_path.rglob("model.ckpt")))
    tested = AnomalibCLI(args=["test", *model, *data, *place, "--trainer.accelerator", "cpu", "--ckpt_path", path])
    assert tested.engine.trainer.callback_metrics.keys() >= {"image_AUROC"}
    target = ["--export_type", "openvino", "--compression_type", "INT8_PTQ", "--ckpt_path", path, *place]
    AnomalibCLI(args=["export", *model[:2], "--model.pre_trained", "false", *data, *target])
    exported = ov.Core().read_model(str(next(tmp_path.rglob("model.xml"))))
    assert any(node.get_type_name() == "FakeQuantize" for node in exported.get_ops())
    image = next(Path(tiny_folder, "test/square").glob("*.png"))
    answer = OpenVINOInferencer(next(tmp_path.rglob("model.xml")), device="CPU").predict(image)
    assert np.isfinite(answer.pred_score).all()


def test_config_without_defects_trains_on_nothing_but_normal_images(tiny_folder, tmp_path):
    config = next(path for path in CONFIGS if path.stem == "rdpp_no_defects")
    changes = {"data.root": tiny_folder, "data.normal_test_dir": "null", "data.num_workers": 0}
    changes |= {"trainer.max_epochs": 5, "trainer.accelerator": "cpu", "default_root_dir": tmp_path}
    changed = [text for key, value in changes.items() for text in (f"--{key}", str(value))]
    AnomalibCLI(args=["train", "--config", str(config), *TINY_OPTIONS, *changed])
    state = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=False)["state_dict"]
    threshold = state["post_processor._image_threshold"]
    assert threshold > 0
    assert state["post_processor.image_max"] == 2 * threshold


@pytest.mark.no_cover
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_parsed_by_the_real_command_line(config):
    AnomalibCLI(args=["train", "--config", str(config), "--model.pre_trained", "false"], run=False)


@pytest.mark.no_cover
def test_benchmark_pipeline_takes_ours_beside_anomalibs(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_TRAINER_MAX_EPOCHS", "1")
    grid = {
        "accelerator": "cpu",
        "benchmark": {
            "seed": 0,
            "model": {"class_path": {"grid": [*MODELS, "Patchcore"]}, "init_args": TINY},
            "data": {
                "class_path": "Folder",
                "init_args": {"name": "tiny", "root": str(tiny_folder), "num_workers": 0, **FOLDERS},
            },
        },
    }
    Path("grid.yaml").write_text(yaml.safe_dump(grid))
    AnomalibCLI(args=["benchmark", "--config", "grid.yaml"])
    rows = pd.read_csv(next(tmp_path.rglob("results.csv")))
    assert list(rows["model.class_path"]) == [*MODELS, "Patchcore"]
    assert rows["image_AUROC"].between(0, 1).all()
