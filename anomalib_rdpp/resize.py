"""The antialiased resize of training inside exported graphs; anomalib switches antialias off for export."""

from typing import TYPE_CHECKING

import numpy as np
from torchvision.transforms.v2 import Resize, Transform

if TYPE_CHECKING:
    from openvino import Model


def keep_antialias(transform: Transform | None, exported: Transform | None) -> None:
    """Give the resizes of a transform's exportable copy their antialias back."""
    if isinstance(transform, Resize):
        exported.antialias = transform.antialias
    for pair in zip(getattr(transform, "transforms", ()), getattr(exported, "transforms", ()), strict=True):
        keep_antialias(*pair)


def resize_as_torch(model: "Model") -> "Model":
    """Let OpenVINO compute the antialias that it reads from ONNX and drops; changes the model and returns it.

    An image that has the model's size already passes by. The other sizes cost time: resize them before, if that counts.
    """
    from openvino import opset13 as ops  # noqa: PLC0415  optional

    for old in model.get_ordered_ops():
        if old.get_type_name() == "Interpolate" and (facts := old.get_attributes())["antialias"]:
            mode = "bicubic_pillow" if facts["mode"] == "cubic" else "bilinear_pillow"
            size = [old.output(0).partial_shape[axis].get_length() for axis in (2, 3)]
            new = ops.interpolate(old.input_value(0), np.array(size), mode, "sizes", axes=np.array([2, 3]))
            for reader in old.output(0).get_target_inputs():
                reader.replace_source_output(new.output(0))
    return model
