"""Where the time of a training step goes, beside a step that does what the official code of RD++ does.

python -m experiments.steps --rounds 9

Both train the same network on the same images and take turns. The published way: noise pixel by pixel in Python, a
transport term of 373 annealing steps that compares a batch with itself, channels before pixels in memory.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from geomloss import SamplesLoss
from opensimplex import OpenSimplex
from torch import nn
from tqdm import tqdm

from anomalib_rdpp import RDPP
from anomalib_rdpp.benchmark.cli import run
from anomalib_rdpp.benchmark.results import Results, commit, markdown
from anomalib_rdpp.rdpp.loss import contrast_loss, reconstruction_loss, transport_loss
from anomalib_rdpp.synthesis.noise import SimplexNoise

NUMBERS = ("median_ms", "min_ms", "max_ms")
KEY = ("way", "part", "rounds", "backbone", "image_size", "batch_size", "device", "threads", "torch", "commit")
COLUMNS = ("way", "part", *NUMBERS, *KEY[2:])
steps_results = partial(Results, "experiments.steps", COLUMNS, KEY, NUMBERS)
NOISE = SimplexNoise()  # the model's default


class Clock:
    """Add up the time of named parts, waiting for the GPU where there is one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rounds: list[dict[str, float]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        start = self._now()
        yield
        self.rounds[-1][name] += 1000 * (self._now() - start)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def run_steps(
    output: Path = Path("results/steps.csv"),
    backbone: str = "resnet18",
    size: int = 256,
    batch: int = 16,
    rounds: int = 7,
) -> str:
    """Time a training step's parts, beside the official code's way, in turns.

    Args:
        output: CSV file, appended to.
        backbone: Teacher, with random weights.
        size: Side of the images in pixels.
        batch: Images per step.
        rounds: Steps of each way, after one that isn't counted.

    Returns:
        A Markdown table of medians in ms, with each part's share of its step.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = RDPP(backbone=backbone, pre_trained=False).to(device).train()
    optimizer = model.configure_optimizers()
    images = torch.rand(batch, 3, size, size, device=device)
    ways: dict[str, Callable[[RDPP, torch.Tensor, Clock], torch.Tensor]] = {"ours": _ours, "published": _published}
    clocks = {name: Clock(device) for name in ways}
    for _ in tqdm(range(rounds + 1), desc=f"steps of {batch} on {device}", unit="round"):
        for name, way in ways.items():
            clock = clocks[name]
            clock.rounds.append(defaultdict(float))
            with clock.part("step"):
                loss = way(model, images, clock)
                with clock.part("backward"):
                    loss.backward()
                with clock.part("optimiser"):
                    optimizer.step()
                    optimizer.zero_grad()
    facts = {
        "rounds": rounds, "backbone": backbone, "image_size": size, "batch_size": batch, "device": device.type,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit(),
    }  # fmt: skip
    results, lines = steps_results(output), defaultdict(dict)
    for name, clock in clocks.items():
        for part in clock.rounds[-1]:
            times = [times[part] for times in clock.rounds[1:]]  # the first round isn't counted
            found = {"median_ms": np.median(times), "min_ms": min(times), "max_ms": max(times)}
            found = {key: round(float(value), 1) for key, value in found.items()}
            results.append({"way": name, "part": part, **found, **facts})
            step = np.median([times["step"] for times in clock.rounds[1:]])
            cell = f"{found['median_ms']:.0f} ({found['median_ms'] / step:.1%})"
            lines[part] |= {"part": part, f"{name}: ms (share)": cell}
    both = zip(*(clock.rounds[1:] for clock in clocks.values()), strict=True)
    ratios = [theirs["step"] / ours["step"] for ours, theirs in both]
    said = f"ours does {np.median(ratios):.2f} times the steps per second ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"{markdown(list(lines.values()))}\n\n{said}"


def _ours(module: RDPP, images: torch.Tensor, clock: Clock) -> torch.Tensor:
    """Do what RDPP's training step does, part by part."""
    model: nn.Module = module.model
    with clock.part("noise"):
        noisy = NOISE(images)
    with clock.part("teacher"):
        teacher, noisy_teacher = model.teacher(images), model.teacher(noisy)
    return _rest(module, teacher, noisy_teacher, clock, transport_loss)


def _published(module: RDPP, images: torch.Tensor, clock: Clock) -> torch.Tensor:
    """Do the same as the official code does it."""
    model: nn.Module = module.model
    with clock.part("noise"):
        noisy = images + 0.2 * torch.stack([_pixel_by_pixel(image.shape) for image in images]).to(images)
    with clock.part("teacher"):
        teacher, noisy_teacher = (
            model.teacher.network((batch - model.teacher.mean) / model.teacher.std) for batch in (images, noisy)
        )
    return _rest(module, teacher, noisy_teacher, clock, _self_transport)


def _rest(
    module: RDPP,
    teacher: list[torch.Tensor],
    noisy_teacher: list[torch.Tensor],
    clock: Clock,
    transport: Callable[[list[torch.Tensor]], torch.Tensor],
) -> torch.Tensor:
    """Do what is the same in both ways: project, reconstruct, compute and weigh the terms."""
    model: nn.Module = module.model
    with clock.part("projection"):
        projected, noisy_projected = model.project(teacher), model.project(noisy_teacher)
    with clock.part("student"):
        student = model.student(projected)
    with clock.part("distillation"):
        distillation = module.loss.distillation(teacher, student)
    with clock.part("reconstruction"):
        reconstruction = reconstruction_loss(noisy_projected, projected)
    with clock.part("contrast"):
        contrast = contrast_loss(noisy_teacher, projected)
    with clock.part("transport"):
        transported = transport(projected)
    return distillation + 0.2 * (transported + 0.01 * reconstruction + 0.1 * contrast) / 1.11


def _self_transport(projected: list[torch.Tensor]) -> torch.Tensor:
    """Compare a batch, each image a point, with itself in another order: always 0."""
    divergence = SamplesLoss("sinkhorn", p=2, blur=0.05, diameter=1e7, scaling=0.95, backend="tensorized")
    return sum(divergence(f.flatten(1), f.flatten(1)[torch.randperm(len(f), device=f.device)]) for f in projected)


def _pixel_by_pixel(shape: torch.Size) -> torch.Tensor:
    """Draw a patch of noise on zeros, one call a pixel and octave."""
    height, width = (int(torch.randint(10, 32, ())) for _ in range(2))
    top, left = (
        int(torch.randint(side - patch + 1, ())) for side, patch in zip(shape[1:], (height, width), strict=True)
    )
    generator = OpenSimplex(int(torch.randint(2**31, ())))
    field = torch.zeros(shape)
    for z, y, x in np.ndindex(3, height, width):
        places = [np.array([x, y, z]) / 32 * 2**octave for octave in range(6)]
        field[z, top + y, left + x] = sum(0.6**octave * generator.noise3(*place) for octave, place in enumerate(places))
    return field


if __name__ == "__main__":
    run("python -m experiments.steps", run_steps)
