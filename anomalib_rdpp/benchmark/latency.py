"""Latency of models at batch 1, each in every precision, on the CPU of this machine.

All candidates of a backbone take turns: one inference each, round after round, so that whatever else the machine does
hits all alike; median and 10th and 90th percentile of the rounds. First result, peak memory: in a process of their own.
Weights are random unless a checkpoint is given: they cost the same time.
"""

import hashlib
import inspect
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from .build import class_of, sides
from .exports import FILES, PRECISIONS, export
from .filled import bank_of, build_filled
from .grid import read_keys, refuse_unknown
from .probe import has_bfloat16, load_runner
from .results import Results, commit

logger = logging.getLogger(__name__)

KEY = ("model", "backbone", "precision", "threads", "image_size")
NUMBERS = ("median_ms", "p10_ms", "p90_ms", "rounds", "first_result_ms", "peak_mib", "file_mib", "gmac")
FACTS = ("bank", "processor", "openvino", "torch", "anomalib", "commit", "input_size", "error")
latency_results = partial(Results, "anomalib_rdpp.benchmark latency", (*KEY, *NUMBERS, *FACTS), KEY, NUMBERS)
PERCENTILES = {"median_ms": 50, "p10_ms": 10, "p90_ms": 90}
Candidate = tuple[dict[str, Any], Path, str, int]  # what is known, exported model, f32 or bf16, side of its image
PAUSE = 0.01  # seconds before each inference, so that the worker threads of the one before have gone to sleep


def run_latency(
    grid: Path, output: Path = Path("results/latency.csv"), minutes: float = 30.0,
    backbones: Sequence[str] | None = None, precisions: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Time models x precisions x threads at batch 1, interleaved.

    Args:
        grid: YAML with models, backbones, precisions, threads, image_size and rounds, see docs/benchmark.md. A model
            that fails becomes rows with its error; precisions in bfloat16 are left out where the CPU has none.
        output: CSV file, appended to; exported models are kept beside it, so that a second run need not wait for them.
        minutes: Bound on the rounds of all; each backbone and number of threads gets its share.
        backbones: Instead of the grid's.
        precisions: Instead of the grid's. All models in all precisions are in memory at once.

    Raises:
        ValueError: If a key is missing, a precision is unknown, none is left, or a checkpoint would stand for several
            backbones.
    """
    settings = read_keys(grid, {"models", "backbones", "precisions", "threads", "image_size", "rounds"}, "latency")
    for key, chosen in (("backbones", backbones), ("precisions", precisions)):
        settings[key] = list(dict.fromkeys(chosen or settings[key]))
    refuse_unknown(settings["precisions"], PRECISIONS)
    stored = [name for name, own in settings["models"].items() if "ckpt_path" in own]
    if len(settings["backbones"]) > 1 and stored:
        several = f"{', '.join(stored)} would be measured with each of {', '.join(settings['backbones'])}"
        msg = f"A checkpoint has its own backbone, but {several}: write `ckpt_path` in a grid of one backbone."
        raise ValueError(msg)
    left_out = [] if has_bfloat16() else [each for each in settings["precisions"] if PRECISIONS[each][1] == "bf16"]
    settings["precisions"] = [each for each in settings["precisions"] if each not in left_out]
    if left_out:
        logger.warning("this CPU has no bfloat16: without %s", " and ".join(left_out))
    if not settings["precisions"]:
        msg = f"Nothing is left to measure: this CPU has no bfloat16; choose of {', '.join(map(repr, PRECISIONS))}."
        raise ValueError(msg)
    results = latency_results(output)
    seconds = 60 * minutes / (len(settings["backbones"]) * len(settings["threads"]))
    for backbone in settings["backbones"]:
        candidates = _export_all(settings, backbone, output.parent / "latency_models", results)
        for threads in settings["threads"] if candidates else ():
            _measure(candidates, threads, settings["rounds"], seconds, results)


def _export_all(grid: dict[str, Any], backbone: str, folder: Path, results: Results) -> list[Candidate]:
    """Export every model in every precision; one that fails becomes rows with its error."""
    candidates = []
    for name, entry in tqdm(grid["models"].items(), desc=f"export {backbone}", unit="model"):
        row = {"model": name, "backbone": backbone, "image_size": grid["image_size"], "commit": commit()}
        row |= {package: version(package) for package in ("openvino", "torch", "anomalib")}
        row["processor"] = ov.Core().get_property("CPU", "FULL_DEVICE_NAME")
        each = product(grid["threads"], grid["precisions"])
        with results.run(*({**row, "threads": threads, "precision": precision} for threads, precision in each)):
            known, place = _export(name, entry, backbone, grid["image_size"], folder)
            size = known.pop("size")
            for precision in grid["precisions"]:
                kind, arithmetic = PRECISIONS[precision]
                candidates.append(({**row, **known, "precision": precision}, place / FILES[kind], arithmetic, size))
    return candidates


def _export(name: str, entry: dict[str, Any], backbone: str, size: int, folder: Path) -> tuple[dict[str, Any], Path]:
    """Export a model unless an earlier run did; INT8 is calibrated on one random image."""
    place = folder / _digest(entry, backbone, size, name)
    facts = place / "facts.json"
    if not facts.exists():
        shutil.rmtree(place, ignore_errors=True)  # of a run that was cut short
        module = build_filled(entry, backbone, size)
        size, seen = sides(module.pre_processor, size)
        image = torch.rand(1, 3, size, size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(image)
        for kind in FILES:
            export(module, kind, place, size, lambda: [image], fast=True)
        gmac = round(counter.get_total_flops() / 2e9, 2)  # a multiplication and an addition are one
        known = {"gmac": gmac, "bank": bank_of(module), "input_size": seen, "size": size}
        facts.write_text(json.dumps(known))  # last: what comes before is whole
    return json.loads(facts.read_text()), place


def _digest(entry: dict[str, Any], *arguments: object) -> str:
    """Name what an exported model depends on: our code, that of its class, its checkpoint, versions and arguments."""
    here, stored = Path(__file__).parent, [Path(entry[key]).stat() for key in ("ckpt_path",) if key in entry]
    files = [path for path in sorted(here.parent.rglob("*.py")) if path.parent != here]
    files += [here / "exports.py", here / "filled.py", Path(inspect.getfile(class_of(entry)))]
    versions = [version(package) for package in ("anomalib", "torch", "openvino", "nncf")]
    stamps = [(file.st_size, file.st_mtime_ns) for file in stored]
    content = entry, arguments, versions, stamps, [path.read_bytes() for path in files]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def _measure(candidates: list[Candidate], threads: int, rounds: int, seconds: float, results: Results) -> None:
    """Let the candidates that run take turns, then write a row each, with the rounds that there were."""
    torch.set_num_threads(threads)
    probes = [_probe(path, threads, size, kind) for _, path, kind, size in tqdm(candidates, desc="first result")]
    rows, turns = [], []
    for (known, path, arithmetic, size), probe in zip(candidates, probes, strict=True):
        row = {**known, "threads": threads}
        with results.run(row):
            runner = load_runner(path, threads, size, arithmetic)
            image = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32)
            runner(image)  # warm-up
            rows.append(row | probe)
            turns.append((runner, image))
    times, end = [], time.perf_counter() + seconds
    try:
        for _ in tqdm(range(rounds), desc=f"{threads} threads", unit="round"):
            times.append([_time(*turn) for turn in turns])
            if time.perf_counter() > end:
                logger.warning("the bound on time ended the measurement after %d of %d rounds", len(times), rounds)
                break
    finally:
        for row, spent in zip(rows, np.array(times).T, strict=False):  # nothing if there was no round
            found = {name: round(float(np.percentile(spent, q)), 2) for name, q in PERCENTILES.items()}
            results.append({**row, "rounds": len(spent), **found})


def _time(runner: Callable[[np.ndarray], object], image: np.ndarray) -> float:
    """Milliseconds of one inference."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    runner(image)
    return 1000 * (time.perf_counter() - start)


def _probe(path: Path, *arguments: object) -> dict[str, float]:
    """Time to the first result from the loading on, and peak memory, in a process that does only this."""
    command = [sys.executable, Path(__file__).with_name("probe.py"), path, *arguments]
    places = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # where a user's own model may be
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=places)  # noqa: S603
    if found.returncode:
        logger.warning("no first result of %s: %s", path, found.stderr[-300:])
        return {}
    size = sum(file.stat().st_size for file in (path, *path.parent.glob(f"{path.stem}.bin")))
    return {**json.loads(found.stdout.splitlines()[-1]), "file_mib": round(size / 2**20, 1)}
