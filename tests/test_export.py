"""Exports: whole or not at all, errors before work starts, INT8 calibrated on training images with its map in float."""

import nncf
import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.deploy import CompressionType
from openvino import opset13 as ops
from tiny import MODELS, TINY, build
from torchvision.transforms.v2 import RandomHorizontalFlip
from torchvision.transforms.v2.functional import resize

from anomalib_rdpp.anomaly_map import AnomalyMapGenerator
from anomalib_rdpp.benchmark.probe import has_bfloat16
from anomalib_rdpp.export import calibration_images, make_upsampling_pointwise, map_operations, quantize

SIZE = (64, 96)


def compiled(network):
    """In single precision, where OpenVINO takes bfloat16 by itself if the CPU has it."""
    return ov.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


@pytest.fixture(params=MODELS)
def model(request):
    return build(request.param, SIZE).eval()


@pytest.mark.parametrize("score", ["coarse", "standardised"])
def test_cascade_with_the_coarsest_scales_score_is_exported(score, tmp_path):
    model = build("RDPP", SIZE, student="cascade", score=score).eval()
    if score == "standardised":
        model.model.student.standardise(torch.rand(2, model.model.teacher.channels[-1], 8, 8), is_counted=True)
    images = torch.rand(2, 3, *SIZE)
    network = ov.Core().read_model(model.to_openvino(tmp_path))
    with torch.no_grad():
        expected = model(images)
    found = compiled(network)(images.numpy())
    np.testing.assert_allclose(found["pred_score"], expected.pred_score, rtol=1e-4)
    np.testing.assert_allclose(found["anomaly_map"], expected.anomaly_map, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("compression", [CompressionType.INT8_PTQ, "int8_acq"])
def test_calibration_without_data_is_refused_before_work_starts(model, tmp_path, monkeypatch, compression):
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("work has started"))
    with pytest.raises(ValueError, match="needs images to calibrate on, but no data was given: add --data"):
        model.to_openvino(tmp_path, input_size=SIZE, compression_type=compression)


@pytest.mark.parametrize(("package", "compression"), [("openvino", None), ("onnxscript", None), ("nncf", "int8")])
def test_missing_package_is_named_with_what_to_install(model, tmp_path, monkeypatch, package, compression):
    from anomalib_rdpp import export

    monkeypatch.setattr(export, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(ModuleNotFoundError, match=f"needs {package}: pip install"):
        model.to_openvino(tmp_path, input_size=SIZE, compression_type=compression)


def test_interrupted_export_leaves_what_was_there(model, tmp_path, monkeypatch):
    earlier = tmp_path / "weights" / "torch" / "model.pt"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("earlier")

    def save_half(obj, f):  # noqa: ARG001  torch.save names it
        f.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(KeyboardInterrupt):
        model.to_torch(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [earlier]
    assert earlier.read_text() == "earlier"


def test_calibration_takes_training_images_in_order_without_augmentation(tiny_data):
    tiny_data.setup()
    tiny_data.train_data.augmentations = RandomHorizontalFlip(1.0)
    batches = list(calibration_images(tiny_data))
    paths = [path for batch in batches for path in batch.image_path]
    assert paths == sorted(paths)
    assert len(paths) == 6
    assert all("train/good" in path for path in paths)
    tiny_data.train_data.augmentations = None
    torch.testing.assert_close(
        {path: image for batch in batches for path, image in zip(batch.image_path, batch.image, strict=True)}[paths[0]],
        next(item.image for item in tiny_data.train_data if item.image_path == paths[0]),
    )


@pytest.mark.parametrize(
    ("name", "backbone"),  # RD++ with the small teacher is in tests/test_users_export.py
    [("AAND", TINY["backbone"]), *(pytest.param(name, "resnet18", marks=pytest.mark.slow) for name in MODELS)],
)
def test_int8_keeps_the_map_in_float_and_near_fp32(name, backbone, tiny_data, tmp_path):
    model = build(name, SIZE, backbone=backbone).eval()
    path = model.to_openvino(tmp_path, input_size=SIZE, ov_kwargs={"input": [1, 3, *SIZE]})
    network = ov.Core().read_model(path)
    assert list(network.input(0).shape) == [1, 3, *SIZE], "a fixed batch is an option of OpenVINO's converter"
    quantized = quantize(network, tiny_data, preset=nncf.QuantizationPreset.PERFORMANCE)
    operations = [operation.get_type_name() for operation in quantized.get_ops()]
    assert "FakeQuantize" in operations
    in_float = map_operations(network)
    assert {"MatMul", "Add"} <= {
        each.get_type_name() for each in network.get_ops() if each.get_friendly_name() in in_float
    }
    for operation in quantized.get_ops():
        if operation.get_friendly_name() in in_float:
            sources = [value.get_source_output().get_node().get_type_name() for value in operation.inputs()]
            assert "FakeQuantize" not in sources, operation.get_friendly_name()
    image = resize(next(iter(calibration_images(tiny_data))).image, SIZE).numpy()
    exact, close = (compiled(each)(image)["anomaly_map"] for each in (network, quantized))
    assert np.abs(exact - close).max() < 0.1 * exact.max()


@pytest.mark.skipif(not has_bfloat16(), reason="this CPU has no bfloat16")
def test_small_distances_keep_their_digits_in_bfloat16(tmp_path):
    class NearlyEqual(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher, self.student = (torch.nn.Conv2d(3, 128, 3, 4, 1) for _ in range(2))
            for near, exact in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                near.data = exact.data + 0.05 * exact.data.std() * torch.randn_like(exact)
            self.generate = AnomalyMapGenerator()

        def forward(self, images):
            return self.generate([self.teacher(images)], [self.student(images)], (64, 64)).anomaly_map

    torch.manual_seed(0)
    images = torch.rand(2, 3, 64, 64)
    torch.onnx.export(NearlyEqual().eval(), (images,), tmp_path / "map.onnx", dynamo=True, opset_version=18)
    exact, half = (
        ov.compile_model(tmp_path / "map.onnx", "CPU", {"INFERENCE_PRECISION_HINT": hint})(images.numpy())[0]
        for hint in ("f32", "bf16")
    )
    assert exact.max() < 0.01, "as small as for normal images"
    assert 0 < np.abs(half - exact).max() < 0.1 * exact.max()


@pytest.mark.parametrize("name", ["RDPP", pytest.param("AAND", marks=pytest.mark.slow)])  # which have one student
def test_pointwise_upsampling_gives_the_same_map(name, tmp_path):
    model, generator = build(name, SIZE, backbone="resnet18"), torch.Generator().manual_seed(0)
    for norm in model.model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):  # as after training: no bias is 0
            torch.nn.init.normal_(norm.bias, std=0.1, generator=generator)
    network = ov.Core().read_model(model.to_openvino(tmp_path, input_size=SIZE))
    pointwise = make_upsampling_pointwise(network.clone())
    kinds = [[operation.get_type_name() for operation in each.get_ops()] for each in (network, pointwise)]
    assert kinds[0].count("ConvolutionBackpropData") == kinds[1].count("DepthToSpace") == 6
    assert "ConvolutionBackpropData" not in kinds[1]
    assert kinds[0].count("Relu") == kinds[1].count("Relu"), "the old ReLUs are gone, not doubled"
    image = torch.rand(2, 3, *SIZE, generator=generator).numpy()
    exact, same = (compiled(each)(image)["anomaly_map"] for each in (network, pointwise))
    np.testing.assert_allclose(same, exact, atol=1e-5 * np.ptp(exact))


@pytest.mark.parametrize(
    ("kernel", "options", "bias", "turned"),
    [
        ((2, 2), {}, (1, 6, 1, 1), True),
        ((3, 3), {"strides": [3, 3]}, (1, 6, 1, 1), True),
        ((2, 2), {}, (1, 1, 1, 1), True),
        ((2, 2), {}, (1, 6, 10, 12), True),
        ((4, 4), {"pads_begin": [1, 1], "pads_end": [1, 1]}, (1, 6, 1, 1), False),
        ((2, 2), {"pads_begin": [1, 0], "pads_end": [0, 1]}, (1, 6, 1, 1), False),
        ((2, 2), {"dilations": [2, 2]}, (1, 6, 1, 1), False),
    ],
)
def test_other_transposed_convolutions_keep_their_answer(kernel, options, bias, turned):
    generator = np.random.default_rng(0)
    weights, features = (generator.random(shape, dtype=np.float32) for shape in ((4, 6, *kernel), (1, 4, 5, 6)))
    given = ops.parameter(features.shape, np.float32)
    upsampled = ops.convolution_backprop_data(given, weights, **({"strides": [2, 2]} | options))
    biased = ops.relu(ops.add(upsampled, generator.random(bias, dtype=np.float32) - 2))
    model = ov.Model([biased], [given])
    exact = compiled(model)(features)[0]
    make_upsampling_pointwise(model)
    assert turned == ("DepthToSpace" in [operation.get_type_name() for operation in model.get_ops()])
    np.testing.assert_allclose(compiled(model)(features)[0], exact, atol=1e-5)
