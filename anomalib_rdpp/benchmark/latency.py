"""Latency of models at batch 1, each in every precision, on the CPU of this machine.

All candidates of a backbone take turns: one inference each, round after round, so that whatever else the machine does
hits all alike; median and 10th and 90th percentile of the rounds. First result, peak memory: in a process of their own.
Weights are random unless a checkpoint is given: they cost the same time.
"""

import hashlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import nncf
import numpy as np
import openvino as ov
import torch
import torchvision
from anomalib.models import AnomalibModule, Cfa, Patchcore
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor
from tqdm import tqdm

from anomalib_rdpp.export import SafeExportMixin, quantize_all_but_map

from .grid import read_keys
from .probe import has_bfloat16, load_runner
from .rows import append_row, commit

logger = logging.getLogger(__name__)

PRECISIONS = {  # file, and what OpenVINO computes in where it isn't in 8 bits
    "torch": ("weights/torch/model.pt", "f32"),
    "fp32": ("weights/openvino/model.xml", "f32"),
    "fp16": ("weights/openvino/fp16.xml", "f32"),
    "bf16": ("weights/openvino/model.xml", "bf16"),
    "int8": ("weights/openvino/int8.xml", "f32"),
    "int8, bf16": ("weights/openvino/int8.xml", "bf16"),
}
KEY = ("model", "backbone", "precision", "threads", "image_size")
COLUMNS = (
    *KEY,
    "median_ms", "p10_ms", "p90_ms", "rounds",
    "first_result_ms", "peak_mib", "file_mib", "gmac", "bank",
    "processor", "openvino", "torch", "anomalib", "commit", "error",
)  # fmt: skip
PERCENTILES = {"median_ms": 50, "p10_ms": 10, "p90_ms": 90}
PAUSE = 0.01  # seconds before each inference, so that the worker threads of the one before have gone to sleep


class Candidate(NamedTuple):
    """One model in one precision."""

    row: dict[str, Any]  # what is known without running it
    path: Path  # of the exported model
    arithmetic: str  # f32 or bf16


def run_latency(
    config: Path,
    output: Path,
    minutes: float = 30.0,
    backbones: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
) -> None:
    """Measure a grid and append its rows.

    Args:
        config: YAML with ``models`` (a mapping from a name to ``class_path``, ``init_args``, and, if wanted, ``bank``,
            the entries of PatchCore's memory bank, or ``ckpt_path``), ``backbones``, ``precisions``, ``threads``,
            ``image_size`` and ``rounds``. A model that fails becomes rows with its error; precisions in bfloat16 are
            left out where the CPU has none.
        output: CSV file, appended to; exported models are kept beside it, so that a second run need not wait for them.
        minutes: Bound on the rounds of all; each backbone and number of threads gets its share.
        backbones: Instead of the grid's.
        precisions: Instead of the grid's. All models in all precisions are in memory at once.

    Raises:
        ValueError: If a key is missing, a precision is unknown, none is left, or a checkpoint would stand for several
            backbones.
    """
    grid = read_keys(config, {"models", "backbones", "precisions", "threads", "image_size", "rounds"}, "latency")
    for key, chosen in (("backbones", backbones), ("precisions", precisions)):
        grid[key] = list(dict.fromkeys(chosen or grid[key]))
    if unknown := set(grid["precisions"]) - set(PRECISIONS):
        msg = f"Unknown precision {sorted(unknown)}; choose of {', '.join(map(repr, PRECISIONS))}."
        raise ValueError(msg)
    if len(grid["backbones"]) > 1 and (stored := [name for name, own in grid["models"].items() if "ckpt_path" in own]):
        msg = (
            f"A checkpoint has its own backbone, but {', '.join(stored)} would be measured with each of "
            f"{', '.join(grid['backbones'])}: write models with `ckpt_path` in a grid of one backbone."
        )
        raise ValueError(msg)
    if not has_bfloat16() and (left_out := [each for each in grid["precisions"] if PRECISIONS[each][1] == "bf16"]):
        logger.warning("this CPU has no bfloat16: without %s", " and ".join(left_out))
        grid["precisions"] = [each for each in grid["precisions"] if each not in left_out]
        if not grid["precisions"]:
            msg = f"Nothing is left to measure: this CPU has no bfloat16; choose of {', '.join(map(repr, PRECISIONS))}."
            raise ValueError(msg)
    seconds = 60 * minutes / (len(grid["backbones"]) * len(grid["threads"]))
    for backbone in grid["backbones"]:
        candidates = export_all(grid, backbone, output.parent / "latency_models", output)
        for threads in grid["threads"] if candidates else ():
            _measure(candidates, threads, grid["image_size"], grid["rounds"], seconds, output)


def export_all(grid: dict[str, Any], backbone: str, folder: Path, output: Path) -> list[Candidate]:
    """Export every model in every precision, unless an earlier run did; one that fails becomes rows with its error."""
    size = grid["image_size"]
    candidates = []
    for name, entry in tqdm(grid["models"].items(), desc=f"export {backbone}", unit="model"):
        row = {"model": name, "backbone": backbone, "image_size": size, **_facts()}
        try:
            place = folder / _digest(backbone, size, name, entry, _stamp(entry))
            facts = place / "facts.json"
            if not facts.exists():
                module = _build(entry, backbone, size)
                known = {"gmac": round(_multiply_adds(module, size), 2), "bank": _bank_size(module)}
                _export(module, place, size)
                facts.write_text(json.dumps(known))  # last: what comes before is whole
            row |= json.loads(facts.read_text())
            for precision in grid["precisions"]:
                file, arithmetic = PRECISIONS[precision]
                candidates.append(Candidate({**row, "precision": precision}, place / file, arithmetic))
        except Exception as error:
            logger.exception("%s failed", name)
            failed = {**row, "error": f"{type(error).__name__}: {error}"}
            for threads, precision in product(grid["threads"], grid["precisions"]):
                append_row(output, COLUMNS, {**failed, "threads": threads, "precision": precision})
    return candidates


def _measure(
    candidates: list[Candidate],
    threads: int,
    size: int,
    rounds: int,
    seconds: float,
    output: Path,
) -> None:
    """Let the candidates that run take turns, then write a row each, with the rounds that there were."""
    torch.set_num_threads(threads)
    probes = [_probe(candidate, threads, size) for candidate in tqdm(candidates, desc="first result")]
    image = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32)
    rows, runners = [], []
    for candidate, probe in zip(candidates, probes, strict=True):
        row = {**candidate.row, "threads": threads}
        try:
            runner = load_runner(candidate.path, threads, size, candidate.arithmetic)
            runner(image)  # warm-up
        except Exception as error:
            logger.exception("%s in %s failed", row["model"], row["precision"])
            append_row(output, COLUMNS, {**row, "error": f"{type(error).__name__}: {error}"})
            continue
        rows.append(row | probe)
        runners.append(runner)
    times = []
    end = time.perf_counter() + seconds
    try:
        for _ in tqdm(range(rounds), desc=f"{threads} threads", unit="round"):
            times.append([_time(runner, image) for runner in runners])
            if time.perf_counter() > end:
                logger.warning("the bound on time ended the measurement after %d of %d rounds", len(times), rounds)
                break
    finally:
        if times:
            for row, spent in zip(rows, np.array(times).T, strict=True):
                found = {name: round(float(np.percentile(spent, q)), 2) for name, q in PERCENTILES.items()}
                append_row(output, COLUMNS, {**row, "rounds": len(spent), **found})


def _time(runner: Callable[[np.ndarray], object], image: np.ndarray) -> float:
    """Milliseconds of one inference."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    runner(image)
    return 1000 * (time.perf_counter() - start)


def _probe(candidate: Candidate, threads: int, size: int) -> dict[str, float]:
    """Time to the first result from the loading on, and peak memory, in a process that does only this."""
    path = candidate.path
    arguments = [path, threads, size, candidate.arithmetic]
    command = [sys.executable, str(Path(__file__).with_name("probe.py")), *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if found.returncode:
        logger.warning("no first result of %s: %s", path, found.stderr[-300:])
        return {}
    files = [path, *path.parent.glob(f"{path.stem}.bin")]
    size_mib = sum(file.stat().st_size for file in files) / 2**20
    return {**json.loads(found.stdout.splitlines()[-1]), "file_mib": round(size_mib, 1)}


def _build(entry: dict[str, Any], backbone: str, size: int) -> AnomalibModule:
    """Build a model with random weights, or load its checkpoint, and fill what training would fill."""
    module, _, class_name = entry["class_path"].rpartition(".")
    model_class = getattr(import_module(module or "anomalib.models"), class_name)
    if "ckpt_path" in entry:
        return model_class.load_from_checkpoint(entry["ckpt_path"]).eval()
    init_args = {"backbone": backbone, **entry.get("init_args", {})}
    if model_class is not Cfa:  # which has no such argument
        init_args = {"pre_trained": False, **init_args}
    torch.manual_seed(0)
    with mock.patch("anomalib.models.image.cfa.torch_model.get_feature_extractor", _random_extractor):
        model = model_class(**init_args, pre_processor=model_class.configure_pre_processor((size, size))).eval()
    if isinstance(model, Patchcore):
        channels = sum(model.model.feature_extractor.out_dims)
        model.model.memory_bank = torch.randn(entry["bank"], channels)
    if isinstance(model, Cfa):
        model.model.initialize_centroid([SimpleNamespace(image=torch.rand(1, 3, size, size))])
    return model


def _random_extractor(backbone: str, return_nodes: list[str]) -> torch.nn.Module:
    """CFA's network without the download that the host has no argument against."""
    return create_feature_extractor(getattr(torchvision.models, backbone)(weights=None), return_nodes).eval()


def _export(module: AnomalibModule, place: Path, size: int) -> None:
    """Export as the host does, but for all precisions from one conversion.

    INT8 is calibrated on one random image, others' without bias correction: values change by that, no operation does.
    """
    module.to_torch(place)
    core = ov.Core()
    fixed = {"dynamic_shapes": None}  # batch 1; PatchCore can be exported with a fixed batch only
    network = core.read_model(module.to_openvino(place, input_size=(size, size), onnx_kwargs=fixed))
    ov.save_model(network, place / PRECISIONS["fp16"][0], compress_to_fp16=True)
    images = nncf.Dataset([torch.rand(1, 3, size, size)])
    if isinstance(module, SafeExportMixin):
        quantized = quantize_all_but_map(network, images, subset_size=1)
    else:
        fast = nncf.AdvancedQuantizationParameters(disable_bias_correction=True)
        quantized = nncf.quantize(network, images, subset_size=1, advanced_parameters=fast)
    ov.save_model(quantized, place / PRECISIONS["int8"][0], compress_to_fp16=False)


def _stamp(entry: dict[str, Any]) -> tuple[int, ...]:
    """Tell a checkpoint's content by its file's size and time."""
    if "ckpt_path" not in entry:
        return ()
    facts = Path(entry["ckpt_path"]).stat()
    return facts.st_size, facts.st_mtime_ns


def _digest(*arguments: object) -> str:
    """Name what an exported model depends on: its arguments, the versions and our code."""
    package = Path(__file__).parents[1]
    sources = [path.read_bytes() for path in sorted(package.rglob("*.py")) if path.parent != Path(__file__).parent]
    versions = [version(name) for name in ("anomalib", "torch", "openvino", "nncf")]
    return hashlib.sha256(repr((arguments, versions, sources)).encode()).hexdigest()[:16]


@torch.no_grad()
def _multiply_adds(module: AnomalibModule, size: int) -> float:
    """Thousand millions of multiply-adds of one image, convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        module(torch.rand(1, 3, size, size))
    return counter.get_total_flops() / 2e9


def _bank_size(module: AnomalibModule) -> str:
    """Entries x channels of what PatchCore or CFA search."""
    bank = getattr(module.model, "memory_bank", None)
    if bank is None:
        return ""
    shape = bank.shape if isinstance(module, Patchcore) else bank.T.shape
    return " x ".join(map(str, shape))


def _facts() -> dict[str, str]:
    """What makes a row reproducible."""
    return {
        "processor": ov.Core().get_property("CPU", "FULL_DEVICE_NAME"),
        **{package: version(package) for package in ("openvino", "torch", "anomalib")},
        "commit": commit(),
    }
