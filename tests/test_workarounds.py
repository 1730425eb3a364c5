"""A canary for whatever we step around in anomalib and other libraries: the list of faults and of private names in use.

Each test asserts that a fault is still there and fails on the day it is mended. Its text says what of ours can go then.
"""

import ast
import copy
import gc
import inspect
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import anomalib
import numpy as np
import openvino as ov
import pandas as pd
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.data.datasets.depth.mvtec_3d import make_mvtec_3d_dataset
from anomalib.data.utils import read_image
from anomalib.data.utils.generators import PerlinAnomalyGenerator
from anomalib.deploy import CompressionType
from anomalib.engine.engine import _TrainerArgumentsCache
from anomalib.metrics import AUPRO, AUROC, Evaluator
from anomalib.models import Cfa, get_model
from anomalib.models.components import AnomalibModule, GaussianBlur2d
from anomalib.models.components.backbone import get_decoder
from anomalib.models.components.base.export_mixin import ExportMixin
from anomalib.models.image.reverse_distillation.components import get_bottleneck_layer
from anomalib.pipelines.benchmark.job import BenchmarkJob
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.trainer.connectors.data_connector import _DataHookSelector, warning_cache
from onnx import helper, numpy_helper
from PIL import Image
from sklearn.metrics import roc_auc_score
from tiny import TINY, build
from torchvision.transforms.v2 import Resize
from torchvision.transforms.v2.functional import resize

from anomalib_rdpp import AAND, RDPP
from anomalib_rdpp.threshold import NormalThreshold

PACKAGE = Path(__file__).parents[1] / "anomalib_rdpp"
CASES = Path(__file__).with_name("cases")

# Private names of others that the package uses, and the test here that says why.
PRIVATE = {
    "_data_source": "test_loaders_that_a_trainer_was_given_have_a_private_name",
    "_image_threshold": "test_threshold_of_the_post_processor_has_no_public_setter",
    "_pixel_threshold": "test_threshold_of_the_post_processor_has_no_public_setter",
    "_trainer": "test_module_without_trainer_can_only_be_told_by_a_private_name",
}


@pytest.fixture(scope="module")
def model():
    return build("RDPP").eval()


# -- private names in use


def test_private_names_in_use_are_the_listed_ones():
    used, own = set(), {"_asdict", "_replace"}  # public, of named tuples
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute):
                (own if isinstance(node.ctx, ast.Store) else used).add(node.attr)
            elif isinstance(node, ast.ImportFrom | ast.Import):
                used |= {part for alias in node.names for part in alias.name.split(".")}
                used |= set((getattr(node, "module", None) or "").split("."))
    assert {name for name in used - own if name.startswith("_") and not name.startswith("__")} == PRIVATE.keys()
    assert all(test in globals() for test in PRIVATE.values())


@pytest.mark.parametrize("ours", [RDPP, AAND, NormalThreshold])
def test_no_private_method_is_overridden(ours):
    own = [base for base in ours.__mro__ if base.__module__.startswith("anomalib_rdpp")]
    theirs = {name for base in ours.__mro__ if base not in own for name in vars(base)}
    private = {name for base in own for name in vars(base) if name.startswith("_") and not name.endswith("__")}
    assert not {name for name in private & theirs if not name.startswith("_abc")}


def test_threshold_of_the_post_processor_has_no_public_setter():
    """Once it has one, ``threshold.py`` sets that."""
    assert PostProcessor.image_threshold.fset is None
    assert PostProcessor.pixel_threshold.fset is None
    assert {"_image_threshold", "_pixel_threshold"} <= PostProcessor().state_dict().keys()


def test_module_without_trainer_can_only_be_told_by_a_private_name():
    """Once ``trainer`` answers None, AAND asks that instead of ``_trainer``."""
    with pytest.raises(RuntimeError, match="not attached"):
        LightningModule().trainer  # noqa: B018
    assert LightningModule()._trainer is None


def test_loaders_that_a_trainer_was_given_have_a_private_name():
    """Once they have a public one before the first batch, ``datasets`` of pixels.py asks for that."""
    loop = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).fit_loop
    assert loop._data_source.instance is None
    assert not hasattr(loop, "data_source")


# -- anomalib: registration


def test_models_are_looked_up_one_level_below_the_base_class():
    """Once deeper ones are found, ``DistillationMixin`` can be a base class, an ``AnomalibModule``."""

    class Deeper(RDPP):
        pass

    with pytest.raises(ModuleNotFoundError):
        get_model("deeper")
    del Deeper
    gc.collect()


def test_class_path_is_not_taken_as_a_string():
    """Once it is, ``register`` of registration.py need not wrap ``get_model``."""
    with pytest.raises(ModuleNotFoundError):
        anomalib.models.get_model.__wrapped__("anomalib_rdpp.RDPP", **TINY)


def test_entry_points_are_not_read():
    """Once they are, one line in pyproject.toml takes the place of ``startup/``, hatch_build.py and registration.py."""
    sources = Path(anomalib.__file__).parent.rglob("*.py")
    assert not [path for path in sources if "entry_points" in path.read_text()]


def test_trainer_arguments_of_a_model_override_the_users():
    """Once the user's win, ``trainer_arguments`` may recommend some."""
    cache = _TrainerArgumentsCache(max_epochs=100)
    cache.update(SimpleNamespace(trainer_arguments={"max_epochs": 1}))
    assert cache.args == {"max_epochs": 1}


def test_benchmark_pipeline_takes_no_number_of_epochs():
    """Once it does, the documents need ``PL_TRAINER_MAX_EPOCHS`` no more."""
    with mock.patch("anomalib.pipelines.benchmark.job.Engine") as engine:
        engine.return_value.test.return_value = [{}]
        BenchmarkJob("cpu", None, None, seed=0, flat_cfg={}).run()
    assert engine.call_args.kwargs.keys() == {"accelerator", "devices", "default_root_dir"}
    assert "max_epochs" not in inspect.signature(BenchmarkJob).parameters


# -- anomalib: training and checkpoints


def test_checkpoint_holds_the_evaluators_buffers_but_not_the_evaluator(model):
    """Once it loads, the last lines of ``on_load_checkpoint`` in base.py can go."""
    evaluator = Evaluator(test_metrics=[AUPRO(fields=["anomaly_map", "gt_mask"])])
    trained, checkpoint = build("RDPP", evaluator=evaluator), {}
    AnomalibModule.on_save_checkpoint(trained, checkpoint)
    assert not [name for name in checkpoint if "evaluator" in name]
    with pytest.raises(RuntimeError, match=r"Unexpected key.*evaluator\."):
        model.load_state_dict(trained.state_dict())


def test_checkpoint_does_not_name_the_post_processor():
    """Once it does, and loads it, base.py need not rebuild ``NormalThreshold``."""
    checkpoint = {}
    AnomalibModule.on_save_checkpoint(build("RDPP", post_processor=NormalThreshold()), checkpoint)
    assert "NormalThreshold" not in str(checkpoint)


def test_auroc_depends_on_the_batches():
    """Of raw scores: torchmetrics puts batches beyond [0, 1] through a sigmoid. Once it does not, metrics.py can go."""
    labels = torch.arange(40) >= 20
    scores = 0.8 + 0.3 * torch.rand(40) + 0.1 * labels
    metric = AUROC(fields=["pred_score", "gt_label"])
    for some, truth in zip(scores.split(1), labels.split(1), strict=True):
        metric.update(ImageBatch(image=torch.zeros(1, 3, 32, 32), pred_score=some, gt_label=truth))
    assert float(metric.compute()) != pytest.approx(roc_auc_score(labels, scores))


# -- anomalib: reading data


def test_grey_png_of_16_bits_is_read_as_white():
    """Once it is read as its 8-bit twin is, what we do about 16 bits can go."""
    assert (read_image(CASES / "grey16.png", as_tensor=True) == 1).all()
    assert read_image(CASES / "grey8.png", as_tensor=True).mean() < 0.9


@pytest.mark.filterwarnings("ignore:The 'future.infer_string' option is deprecated")  # by pandas 3
def test_mvtec_3d_with_the_strings_of_pandas_3_has_images_without_mask_path(tmp_path):
    """Once they have one, pandas needs no upper bound in pyproject.toml."""
    for folder in ("train/good/rgb/0.png", "train/good/xyz/0.tiff", "test/hole/rgb/0.png", "test/hole/gt/0.png"):
        (tmp_path / folder).parent.mkdir(parents=True)
        (tmp_path / folder).touch()
    with pd.option_context("future.infer_string", True):
        assert make_mvtec_3d_dataset(tmp_path, "train").mask_path.isna().all()


def test_textures_with_an_upper_case_suffix_are_left_out(tmp_path):
    """Once they are found, synthesis/blending.py gives anomalib the folder instead of a list of files."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "texture.PNG")
    assert not PerlinAnomalyGenerator(tmp_path).anomaly_source_paths


# -- anomalib: parts of the network


def test_neck_of_a_wide_resnet_is_built_at_half_its_width():
    """Once it isn't, student.py gives no ``width_per_group``."""
    with torch.device("meta"):
        neck = get_bottleneck_layer("wide_resnet50_2")
        published = get_bottleneck_layer("wide_resnet50_2", width_per_group=128)
    assert [part.bn_layer[0].conv2.out_channels for part in (neck, published)] == [512, 1024]


def test_neck_has_a_convolution_that_no_pass_uses():
    """Once it is gone, student.py freezes nothing (published weights still hold it)."""
    neck = get_bottleneck_layer("resnet18")
    shapes = ((64, 16), (128, 8), (256, 4))
    neck([torch.rand(2, channels, side, side) for channels, side in shapes]).sum().backward()
    without = {name.split(".")[0] for name, parameter in neck.named_parameters() if parameter.grad is None}
    assert without == {"conv4", "bn4"}


def test_weights_tag_of_timm_is_not_understood():
    """Once it is, student.py needs no ``architecture``."""
    with pytest.raises(ValueError, match="not supported"):
        get_decoder("resnet18.tv_in1k")
    with torch.device("meta"):  # and the neck is, without a word, that of a ResNet-50
        neck = get_bottleneck_layer("resnet18.tv_in1k")
    assert type(neck.bn_layer[0]).__name__ == "Bottleneck"


def test_blur_of_the_map_is_one_dense_kernel():
    """Once it is separable, anomalib's own map may be as fast as ours: measure, then anomaly_map.py may go."""
    assert GaussianBlur2d(sigma=4).kernel.shape[-2:] == (33, 33)


def test_cfa_downloads_its_network_whatever_it_is_told():
    """Once it has ``pre_trained``, the latency benchmark needs no patch."""
    assert "pre_trained" not in inspect.signature(Cfa).parameters


# -- anomalib: export


def test_interrupted_export_leaves_half_a_file(model, tmp_path, monkeypatch):
    """Once it leaves none, ``_move_when_whole`` of export.py can go."""

    def save_half(obj, f):  # noqa: ARG001  torch.save names it
        f.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(KeyboardInterrupt):
        ExportMixin.to_torch(model, tmp_path)
    assert [path.read_text() for path in tmp_path.rglob("*.pt")] == ["half"]


def test_onnx_is_asked_for_in_a_version_that_torch_cannot_write(model, tmp_path):
    """Once it is 18 or more, ``to_onnx`` of ours sets none."""
    with mock.patch("torch.onnx.export") as export:
        ExportMixin.to_onnx(model, tmp_path, input_size=(64, 64))
    assert export.call_args.kwargs["opset_version"] == 14


def test_exported_resize_is_not_antialiased():
    """Once it is, ``keep_antialias`` of resize.py can go."""
    pre_processor = PreProcessor(transform=Resize((8, 8), antialias=True))
    assert pre_processor.transform.antialias
    assert not pre_processor.export_transform.antialias


def test_openvino_drops_the_antialias_of_onnx():
    """Once it computes it, ``resize_as_torch`` of resize.py can go."""
    sizes = numpy_helper.from_array(np.array([1, 1, 8, 8]), "sizes")
    options = {"mode": "linear", "antialias": 1, "coordinate_transformation_mode": "half_pixel"}
    node = helper.make_node("Resize", ["image", "", "", "sizes"], ["small"], **options)
    values = [
        helper.make_tensor_value_info(name, 1, [1, 1, side, side]) for name, side in (("image", 64), ("small", 8))
    ]
    graph = helper.make_graph([node], "resize", values[:1], values[1:], [sizes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    compiled = ov.compile_model(ov.Core().read_model(model.SerializeToString()), "CPU")
    image = torch.rand(1, 1, 64, 64)
    plain, smooth = (resize(image, [8, 8], antialias=antialias) for antialias in (False, True))
    answer = torch.from_numpy(compiled(image.numpy())[0])
    torch.testing.assert_close(answer, plain, atol=1e-2, rtol=0)
    assert (answer - smooth).abs().max() > 0.1


def test_missing_package_is_found_late_and_told_without_a_word(model, tmp_path):
    """Once it is named, ``_require`` of export.py can go."""
    with (
        mock.patch(f"{ExportMixin.__module__}.module_available", return_value=False),
        pytest.raises(ModuleNotFoundError) as raised,
    ):
        ExportMixin.to_openvino(model, tmp_path)
    assert str(raised.value) == ""


def test_calibration_without_data_is_refused_after_the_work():
    """Once it is refused first, ``to_openvino`` of ours needs no check."""
    source = inspect.getsource(ExportMixin.to_openvino)
    assert source.index("self.to_onnx(") < source.index("_compress_ov_model(")
    with pytest.raises(ValueError, match="Datamodule must be provided"):
        ExportMixin._post_training_quantization_ov(None, None)


def test_int8_is_calibrated_on_validation_images(tiny_data):
    """Which by default are test images, in batches that a fixed batch size does not fit. Once it takes training images,
    and lets us keep the map in float, ``quantize`` and ``calibration_images`` of export.py can go.
    """  # noqa: D205
    network = mock.Mock()
    network.input(0).partial_shape = [SimpleNamespace(is_static=False)]
    with mock.patch("nncf.Dataset") as dataset, mock.patch("nncf.quantize") as quantize:
        ExportMixin._compress_ov_model(ExportMixin, network, CompressionType.INT8_PTQ, tiny_data)
    assert dataset.call_args.args[0].dataset is tiny_data.val_data
    assert quantize.call_args.kwargs == {}


# -- Lightning


def test_weight_averaging_resets_frozen_statistics(model):
    """Once it leaves the teacher's alone, base.py need not refuse ``StochasticWeightAveraging``."""
    model = copy.deepcopy(model)
    norm = next(module for module in model.model.teacher.modules() if isinstance(module, torch.nn.BatchNorm2d))
    norm.running_mean.fill_(0.5)
    assert not norm.training
    StochasticWeightAveraging(0.01).reset_batch_norm_and_save_state(model)
    assert (norm.running_mean == 0).all()


def test_fused_optimizer_rules_out_clipping_under_mixed_precision():
    """Once it does not, Adam is fused on a GPU too, and where gradients are clipped (``build_optimizer``)."""
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], fused=True)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        MixedPrecision.clip_gradients(mock.Mock(), optimizer, clip_val=1.0)


def test_hook_of_a_module_beside_a_datamodule_is_warned_of(model, tiny_data):
    """Once it is not, ``setup`` in base.py need not silence it."""
    warning_cache.clear()  # each is given once
    with pytest.warns(UserWarning, match="overridden `on_before_batch_transfer`"):
        _DataHookSelector(model, tiny_data).get_instance("on_before_batch_transfer")


# -- others


def test_names_of_geomloss_cannot_be_imported_by_star():
    """Once they can, nothing changes here but this test."""
    import geomloss

    assert not all(hasattr(geomloss, name) for name in geomloss.__all__)


def test_wheel_of_opensimplex_installs_a_package_named_tests():
    """Once it does not, the tests may be a package and need no ``pythonpath`` and ``--import-mode``."""
    assert [path for path in files("opensimplex") if path.parts[0] == "tests"]


def test_first_threads_of_numba_are_those_that_hang():
    """Once TBB's aren't first, or end on one CPU after a fork, synthesis/noise.py sets no order."""
    code = "import numba; print(numba.config.THREADING_LAYER_PRIORITY[0])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "tbb"
