"""A model in every precision: the files that are timed are the files that are tested."""

from collections.abc import Callable, Sequence
from pathlib import Path

import nncf
import openvino as ov
from anomalib.models import AnomalibModule
from torch import Tensor

from anomalib_rdpp.export import SafeExportMixin, quantize

FILES = {
    "torch": "weights/torch/model.pt",
    "fp32": "weights/openvino/model.xml",
    "fp16": "weights/openvino/fp16.xml",
    "int8": "weights/openvino/int8.xml",
}
PRECISIONS = {  # file, and what OpenVINO computes in where it isn't in 8 bits
    "torch": ("torch", "f32"),
    "fp32": ("fp32", "f32"),
    "fp16": ("fp16", "f32"),
    "bf16": ("fp32", "bf16"),
    "int8": ("int8", "f32"),
    "int8, bf16": ("int8", "bf16"),
}
Images = Callable[[], Sequence[Tensor]]  # gives what INT8 is calibrated on, ``(1, 3, size, size)`` each in [0, 1]


def export(model: AnomalibModule, kind: str, folder: Path, size: int, images: Images, fast: bool = False) -> Path:
    """Write one of ``FILES`` for one image of a fixed size, unless it is there; all come from one conversion.

    INT8 is made as an export of the model makes it: ours quantises all but the map, anomalib's by NNCF's defaults, with
    ``fast`` without bias correction: values change by that, no operation does.
    """
    path = folder / FILES[kind]
    if path.exists():
        return path
    if kind == "torch":
        return model.to_torch(folder)
    if kind == "fp32":  # batch 1: PatchCore can be exported with a fixed batch only
        return model.to_openvino(folder, input_size=(size, size), onnx_kwargs={"dynamic_shapes": None})
    network = ov.Core().read_model(export(model, "fp32", folder, size, images))
    if kind == "int8":
        calibration = images()
        dataset, count = nncf.Dataset(calibration), len(calibration)
        if isinstance(model, SafeExportMixin):
            network = quantize(network, dataset, subset_size=count)
        else:
            options = nncf.AdvancedQuantizationParameters(disable_bias_correction=fast)
            network = nncf.quantize(network, dataset, subset_size=count, advanced_parameters=options)
    ov.save_model(network, path, compress_to_fp16=kind == "fp16")
    return path
