"""Where OpenVINO spends the time of an exported model, by kernel and precision, and how fast its convolutions run.

python -m experiments.profile model.xml
"""

from collections import defaultdict
from pathlib import Path

import numpy as np
import openvino as ov

from anomalib_rdpp.benchmark.cli import run
from anomalib_rdpp.benchmark.results import markdown


def layer_table(model: Path, size: int = 256, threads: int = 2, rounds: int = 30) -> str:
    """Say where OpenVINO spends the time of an exported model at batch 1.

    Args:
        model: OpenVINO or ONNX file whose input is ``(B, 3, H, W)``.
        size: Side of the image in pixels.
        threads: Threads of OpenVINO.
        rounds: Inferences after the first, which isn't counted.

    Returns:
        A Markdown table: milliseconds (mean of the rounds), share and rate of each operation and kernel, the longest
        first. The line above it says how long all multiply-adds of the convolutions would take at the rate of the
        fastest of them: what is left to be won without fewer of them.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not model.is_file():
        msg = f"No model at '{model}': give the .xml that an export to OpenVINO left."
        raise FileNotFoundError(msg)
    core = ov.Core()
    network = core.read_model(model)
    network.reshape([1, 3, size, size])
    macs = _multiply_adds(network)
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": True}
    request = core.compile_model(network, "CPU", {"PERFORMANCE_HINT": "LATENCY", **options}).create_infer_request()
    image = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32)
    request.infer(image)
    spent, kernels = defaultdict(float), {}
    for _ in range(rounds):
        request.infer(image)
        for layer in request.profiling_info:
            if layer.status == ov.ProfilingInfo.Status.EXECUTED:
                spent[layer.node_name] += layer.real_time.total_seconds() * 1000 / rounds
                kernels[layer.node_name] = layer.node_type, layer.exec_type
    total, work = sum(spent.values()), sum(macs.values())
    best = max((macs[name] / spent[name] for name in macs if name in spent and macs[name] > work / 100), default=0.0)
    said = f"{total:.1f} ms in {len(spent)} layers"
    if best:
        said += (
            f"; {work / 1e9:.1f} GMAC of convolutions, {work / best:.1f} ms at the best rate ({best / 1e6:.0f} GMAC/s)"
        )
    groups = defaultdict(list)
    for name, kernel in kernels.items():
        groups[kernel].append(name)
    times, lines = {kernel: sum(spent[name] for name in names) for kernel, names in groups.items()}, []
    for kernel, time in sorted(times.items(), key=lambda item: -item[1]):
        done = sum(macs.get(name, 0) for name in groups[kernel])
        line = {"operation": kernel[0], "kernel and precision": kernel[1], "layers": str(len(groups[kernel]))}
        line |= {"ms": f"{time:.2f}", "share": f"{time / total:.1%}"}
        lines.append(line | {"GMAC/s": f"{done / time / 1e6:.0f}" if done else ""})
    return f"{said}\n\n{markdown(lines)}"


def _multiply_adds(model: ov.Model) -> dict[str, int]:
    """Count the multiply-adds of each convolution by its name."""
    found = {}
    for layer in model.get_ops():
        kind = layer.get_type_name()
        if kind in {"Convolution", "ConvolutionBackpropData"}:
            weights = layer.input(1).get_shape()
            places = layer.output(0).get_shape() if kind == "Convolution" else layer.input(0).get_shape()
            found[layer.get_friendly_name()] = int(np.prod(places[2:]) * np.prod(weights))
    return found


if __name__ == "__main__":
    run("python -m experiments.profile", layer_table)
