"""First result and peak memory of one exported model: ``python probe.py FILE THREADS SIZE ARITHMETIC``.

Run by its path, not as a part of the package: an edge box imports OpenVINO and nothing else.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np


def load_runner(path: Path, threads: int, size: int, arithmetic: str) -> Callable[[np.ndarray], Mapping[str, Any]]:
    """Load an exported model (``.xml`` or ``.pt``) as a function from an image ``(1, 3, size, size)`` to its answers.

    ``arithmetic``, ``f32`` or ``bf16``, is what OpenVINO takes where there are no 8 bits; torch stays in float32.
    """
    if path.suffix == ".pt":
        import torch  # noqa: PLC0415  an OpenVINO model does without

        torch.set_num_threads(threads)
        module = torch.load(path, weights_only=False)["model"].eval()

        def run(image: np.ndarray) -> Mapping[str, Any]:
            with torch.inference_mode():
                return module(torch.from_numpy(image))._asdict()

        return run
    import openvino as ov  # noqa: PLC0415

    core = ov.Core()
    model = core.read_model(path)
    model.reshape([1, 3, size, size])
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": arithmetic}
    compiled = core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY", **options})
    return compiled.create_infer_request().infer


def has_bfloat16() -> bool:
    """Tell whether OpenVINO can compute in bfloat16 on this CPU."""
    import openvino as ov  # noqa: PLC0415

    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def reset_peak() -> None:
    """Let ``peak_mib`` count from now on, where Linux allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> int:
    """Peak memory of this process; Linux counts the parent's before the start to ``ru_maxrss``, but not to VmHWM."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    file, threads, size, arithmetic = sys.argv[1:]
    image = np.zeros((1, 3, int(size), int(size)), np.float32)
    start = time.perf_counter()
    load_runner(Path(file), int(threads), int(size), arithmetic)(image)
    found = {"first_result_ms": round(1000 * (time.perf_counter() - start)), "peak_mib": peak_mib()}
    sys.stdout.write(f"{json.dumps(found)}\n")
