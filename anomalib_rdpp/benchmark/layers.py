"""Where OpenVINO spends the time of an exported model: by operation and by the kernel and precision that ran it."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import openvino as ov


def layer_table(path: Path, size: int = 256, threads: int = 2, rounds: int = 30) -> str:
    """Run a model at batch 1 and add up its layers.

    Args:
        path: OpenVINO or ONNX file whose input is ``(B, 3, H, W)``.
        size: Side of the image in pixels.
        threads: Threads of OpenVINO.
        rounds: Inferences after the first, which isn't counted.

    Returns:
        A Markdown table: milliseconds (mean of the rounds) and share of each operation and kernel, the longest first.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        msg = f"No model at '{path}': give the .xml that an export to OpenVINO left."
        raise FileNotFoundError(msg)
    core = ov.Core()
    model = core.read_model(path)
    model.reshape([1, 3, size, size])
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": True}
    request = core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY", **options}).create_infer_request()
    image = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32)
    request.infer(image)
    spent, layers = defaultdict(float), defaultdict(set)
    for _ in range(rounds):
        request.infer(image)
        for layer in request.profiling_info:
            if layer.status == ov.ProfilingInfo.Status.EXECUTED:
                spent[layer.node_type, layer.exec_type] += layer.real_time.total_seconds() * 1000 / rounds
                layers[layer.node_type, layer.exec_type].add(layer.node_name)
    total = sum(spent.values())
    lines = [f"{total:.1f} ms in {sum(map(len, layers.values()))} layers", ""]
    lines += ["| operation | kernel and precision | layers | ms | share |", "|---|---|---|---|---|"]
    for (operation, kernel), time in sorted(spent.items(), key=lambda item: -item[1]):
        count = len(layers[operation, kernel])
        lines.append(f"| {operation} | {kernel} | {count} | {time:.2f} | {time / total:.1%} |")
    return "\n".join(lines)
