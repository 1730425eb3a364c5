"""Exports that are whole or not there, and INT8 calibrated on normal images.

anomalib writes a model straight under its final name and calibrates INT8 on the validation images, which by its default
are the test images. Here the files are moved into place when they are complete, and calibration for INT8_PTQ takes
training images; INT8_ACQ is anomalib's.
"""

import json
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.deploy import CompressionType
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import resize

from anomalib_rdpp.pixels import read_right
from anomalib_rdpp.resize import resize_as_torch

if TYPE_CHECKING:
    import nncf
    from anomalib.models.components import AnomalibModule as Module
    from openvino import Model
else:  # a mixin: anomalib looks one level below AnomalibModule for models
    Module = object

CALIBRATION_IMAGES = 300  # at most; NNCF's default


class SafeExportMixin(Module):
    """anomalib's export methods, by way of a folder that is gone when they fail."""

    def warn_before_export(self) -> None:
        """Say what an export would lack; nothing, unless a model knows better."""

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export as anomalib does, whole or not at all."""
        self.warn_before_export()
        with _move_when_whole(export_root, self.facts()) as folder:
            path = super().to_torch(folder, model_file_name)
        return Path(export_root) / path.relative_to(folder)

    def to_onnx(  # type: ignore[override]  # as anomalib's, which is unlike Lightning's
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Path:
        """Export as anomalib does, whole or not at all; ``ModuleNotFoundError`` names the packages that are missing."""
        self.warn_before_export()
        _require("onnx", "onnxscript")
        kwargs.setdefault("opset_version", 18)  # torch's least; it would fail to convert to anomalib's 14, and go on
        import onnx  # noqa: PLC0415  optional

        with _quietly(), _move_when_whole(export_root, self.facts()) as folder:
            path = super().to_onnx(folder, model_file_name, input_size, **{"verbose": False, **kwargs})
            model = onnx.load(path, load_external_data=False)
            onnx.helper.set_model_props(model, {name: str(value) for name, value in self.facts().items()})
            onnx.save(model, path)
        return Path(export_root) / path.relative_to(folder)

    def to_openvino(  # type: ignore[override]  # the rest by name alone
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Path:
        """Export as anomalib does, whole or not at all; what can't work is said before work starts.

        Raises:
            ModuleNotFoundError: If a package that this needs is not installed.
            ValueError: If a compression that calibrates has no data.
        """
        self.warn_before_export()
        compression_type = None if compression_type is None else CompressionType(compression_type)
        _require("onnx", "onnxscript", "openvino")
        if compression_type not in (None, CompressionType.FP16):
            _require("nncf")
            import_module("nncf")  # sets its logger's level as it loads, which is silenced below
        if compression_type in (CompressionType.INT8_PTQ, CompressionType.INT8_ACQ) and datamodule is None:
            msg = (
                f"{compression_type.name} needs images to calibrate on, but no data was given: add --data (Python: "
                "datamodule=), or take INT8, which compresses the weights alone."
            )
            raise ValueError(msg)
        import openvino as ov  # noqa: PLC0415  takes a second, and isn't needed elsewhere

        ours = datamodule if compression_type == CompressionType.INT8_PTQ else None
        with _quietly(), TemporaryDirectory() as raw, _move_when_whole(export_root, self.facts()) as folder:
            path = super().to_openvino(
                raw, model_file_name, input_size, None if ours else compression_type, datamodule, **kwargs
            )
            model = resize_as_torch(ov.Core().read_model(path))
            if ours is not None:
                model = quantize(model, ours)
            path = path.relative_to(raw)
            (folder / path).parent.mkdir(parents=True)
            model.set_rt_info({name: str(value) for name, value in self.facts().items()}, "anomalib_rdpp")
            ov.save_model(model, folder / path, compress_to_fp16=False)  # what is in FP16 already stays so
        return Path(export_root) / path

    def facts(self) -> dict[str, str | float]:
        """What a user of an exported model has to know, thresholds and ranges of the raw scores among it."""
        post: Any = self.post_processor
        buffers = {} if post is None else dict(post.named_buffers(recurse=False))
        values = {name.lstrip("_"): value.item() for name, value in buffers.items() if value.numel() == 1}
        scaled = getattr(post, "enable_normalization", False)
        projects = self.hparams.get("projection")
        return {
            "model": self.name,
            "method": self.name if projects is None else "RD++" if projects else "RD",
            "teacher": str(self.hparams.get("backbone")),
            "package": f"anomalib-rdpp {version('anomalib-rdpp')}",
            "input": "(B, 3, H, W), RGB, float32 in [0, 1]",
            "inside": "resize, normalisation of the input, anomaly map, post-processing: add none of these",
            "scores": f"{float(post.normalized_image_threshold):g} is the threshold" if scaled else "raw",
            "resize": str(getattr(self.pre_processor, "transform", None)),
            **{name: value for name, value in values.items() if math.isfinite(value)},
        }


def quantize(model: "Model", images: "AnomalibDataModule | nncf.Dataset", **options: Any) -> "Model":  # noqa: ANN401
    """Quantise to INT8 all but resize and anomaly map.

    Args:
        model: OpenVINO model whose input is ``(B, 3, H, W)`` in [0, 1].
        images: What to calibrate on: a datamodule's training images as they are, without augmentation, or any others.
        options: To be passed to ``nncf.quantize``; they go before ours.

    Returns:
        The quantised model; the one given stays as it is.
    """
    import nncf  # noqa: PLC0415  takes seconds, and isn't needed elsewhere
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet  # noqa: PLC0415

    if not isinstance(images, nncf.Dataset):
        pixels = _Pixels(calibration_images(images), model)
        images, options = nncf.Dataset(pixels), {"subset_size": len(pixels), **options}
    model = make_upsampling_pointwise(model.clone())
    resizes = [each.get_friendly_name() for each in model.get_ops() if each.get_type_name() == "Interpolate"]
    chosen = {
        "ignored_scope": nncf.IgnoredScope(names=resizes + map_operations(model), validate=False),
        "advanced_parameters": nncf.AdvancedQuantizationParameters(
            # Defects reach beyond what normal images do; NNCF's default, the mean of the images' extremes, cuts both.
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
            overflow_fix=nncf.OverflowFix.ENABLE,  # 7 bits of the weights: sums of 8 overflow on a CPU without VNNI
        ),
    }
    return nncf.quantize(model, images, **(chosen | options))


class _Pixels:
    """Batches of the size that a model takes, and a black and a white one, so that no defect is beyond the input."""

    def __init__(self, loader: DataLoader[ImageBatch], model: "Model") -> None:
        sides = [side.get_length() if side.is_static else None for side in model.input(0).partial_shape]
        self.size, self.batch_size = sides[2:], sides[0] or 1
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader) + 2

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in self.loader:
            image = resize(batch.image, self.size) if all(self.size) else batch.image
            yield (images := image.expand(self.batch_size, -1, -1, -1))
        yield from (torch.zeros_like(images), torch.ones_like(images))


def make_upsampling_pointwise(model: "Model") -> "Model":
    """Turn transposed convolutions whose patches don't overlap into 1 x 1 convolutions and a rearrangement of pixels.

    The numbers stay the same; changes the model and returns it. OpenVINO runs a wide transposed convolution in float on
    a CPU without AVX-512, also in an INT8 model; a 1 x 1 convolution runs in 8 bits everywhere. Biases and ReLUs stay
    before the rearrangement, where they are fused.
    """
    import numpy as np  # noqa: PLC0415
    from openvino import opset13 as ops  # noqa: PLC0415  optional, as NNCF

    for transposed in model.get_ordered_ops():
        if transposed.get_type_name() != "ConvolutionBackpropData":
            continue
        features, weight = (transposed.input_value(port) for port in (0, 1))
        channels, out_channels, *sides = weight.get_shape()
        attributes = transposed.get_attributes()
        tiles = attributes["strides"] == sides and attributes["dilations"] == [1, 1]
        padded = any(attributes["pads_begin"] + attributes["pads_end"] + attributes["output_padding"])
        if not tiles or padded or len(set(sides)) > 1 or weight.get_node().get_type_name() != "Constant":
            continue
        rows = weight.get_node().data.transpose(2, 3, 1, 0).reshape(-1, channels, 1, 1)
        pointwise, last = ops.convolution(features, rows, [1, 1], [0, 0], [0, 0], [1, 1]), transposed
        while len(readers := last.output(0).get_target_inputs()) == 1:
            reader = next(iter(readers)).get_node()
            sources = [value.get_node() for value in reader.input_values()]
            constants = [each.data for each in sources if each.get_type_name() == "Constant"]
            biases = [each for each in constants if each.shape == (1, out_channels, 1, 1)]
            if reader.get_type_name() == "Relu":
                pointwise = ops.relu(pointwise)
            elif reader.get_type_name() == "Add" and biases:
                pointwise = ops.add(pointwise, np.tile(biases[0], (1, sides[0] ** 2, 1, 1)))
            else:
                break
            last = reader
        shuffled = ops.depth_to_space(pointwise, "blocks_first", sides[0])  # whole vectors of channels, as they lie
        for reader in last.output(0).get_target_inputs():
            reader.replace_source_output(shuffled.output(0))
    return model


def map_operations(model: "Model") -> list[str]:
    """Name what comes after the last convolutions: the anomaly map and the thresholds.

    None of it may be in 8 bits: distances near 0 would lose their order, and those of defects, which calibration on
    normal images never sees, would be cut off at the greatest of normal images.
    """
    names, feeds_convolution = [], set()
    for operation in reversed(model.get_ordered_ops()):
        readers = [reader.get_node() for output in operation.outputs() for reader in output.get_target_inputs()]
        if any("Convolution" in reader.get_type_name() or reader.get_name() in feeds_convolution for reader in readers):
            feeds_convolution.add(operation.get_name())
        elif "Convolution" not in operation.get_type_name():
            names.append(operation.get_friendly_name())
    return names


def calibration_images(datamodule: AnomalibDataModule) -> DataLoader[ImageBatch]:
    """Load training images one by one, in an order that doesn't change, evenly picked if there are many."""
    datamodule.setup(TrainerFn.FITTING)
    dataset = datamodule.train_data
    step = -(-len(dataset) // CALIBRATION_IMAGES)
    dataset = dataset.subsample(list(dataset.samples["image_path"].sort_values().index[::step]))
    dataset.augmentations = None
    read_right(dataset)
    return DataLoader(dataset, collate_fn=dataset.collate_fn)


@contextmanager
def _move_when_whole(export_root: Path | str, facts: dict[str, str | float]) -> Iterator[Path]:
    """Give a folder beside the final one; its files take their places when nothing went wrong, facts beside them."""
    root = Path(export_root)
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root, prefix=".export-") as name:
        folder = Path(name)
        yield folder
        files = [path for path in folder.rglob("*") if path.is_file()]
        files.append(files[0].with_name("metadata.json"))
        files[-1].write_text(json.dumps(facts, indent=1), encoding="utf-8")
        for path in sorted(files, key=lambda path: path.suffix in {".xml", ".onnx"}):  # weights before what names them
            target = root / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence what exporters say of each operation."""
    talkers = [logging.getLogger(name) for name in ("nncf", "onnx_ir", "onnxscript", "torch.onnx", "torch.utils")]
    levels = [talker.level for talker in talkers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for talker in talkers:
            talker.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for talker, level in zip(talkers, levels, strict=True):
                talker.setLevel(level)


def _require(*packages: str) -> None:
    """Say what to install if a package is missing."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        msg = f"This export needs {', '.join(missing)}: pip install 'anomalib[openvino]' {' '.join(missing)}"
        raise ModuleNotFoundError(msg)
