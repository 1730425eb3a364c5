"""Ideas for the training of a student, each alone: fits on teacher features that are computed once.

python -m experiments.ideas experiments/configs/standardised.yaml --output experiments/results/ideas.csv

A fit is the package's student, loss, optimiser and schedule without Lightning around them; what an idea changes stands
in ``IDEAS``.
"""

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from anomalib.data.datasets import AnomalibDataset
from anomalib.metrics import AUPRO
from lightning import seed_everything
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics.functional import auroc
from tqdm import tqdm

from anomalib_rdpp import RDPP
from anomalib_rdpp.anomaly_map import AnomalyMapGenerator
from anomalib_rdpp.benchmark.build import build_datamodule, build_model
from anomalib_rdpp.benchmark.cli import run
from anomalib_rdpp.benchmark.grid import read_grid
from anomalib_rdpp.benchmark.report import mean_and_spread
from anomalib_rdpp.benchmark.results import Results, commit, markdown
from anomalib_rdpp.pixels import read_right
from anomalib_rdpp.rdpp.loss import RDPPLoss
from anomalib_rdpp.rdpp.torch_model import RDPPFeatures
from anomalib_rdpp.recipe import build_optimizer, cosine_factor, easy_share
from anomalib_rdpp.student import LightStudent, Student

SCORES = {"AUROC_coarsest": "coarse", "AUROC_all": "top", "AUROC_standardised": "standardised"}
KEY = ("data", "model", "idea", "seed", "steps")
NUMBERS = (*KEY[3:], "fit_minutes", *SCORES, "AUPRO")
COLUMNS = (*KEY, *NUMBERS[2:], "by_kind", "batch_size", "commit", "error")
ideas_results = partial(Results, "experiments.ideas", COLUMNS, KEY, NUMBERS)

Features = list[torch.Tensor]


@dataclass(frozen=True)
class Idea:
    """What differs from the fast recipe."""

    clip: float = torch.inf  # norm of the gradient
    averaged: float = 0.0  # decay of a moving average of the weights, which is what is tested
    dropout: float = 0.0  # of the bottleneck's channels
    jitter: float = 0.0  # noise on what the student sees, relative to the length of each feature
    eps: float = 1e-5  # of BatchNorm
    rate: float = 1.0  # factor on the learning rate
    decay: float = 1e-5  # of the weights


IDEAS = {
    "as it is": Idea(),
    "averaged weights": Idea(averaged=0.99),
    "clip 0.1": Idea(clip=0.1),
    "BatchNorm eps 1e-8": Idea(eps=1e-8),
    "jitter 0.2": Idea(jitter=0.2),
    "dropout 0.1": Idea(dropout=0.1),
    "weight decay 0.05": Idea(decay=0.05),
}


def run_ideas(
    grids: Sequence[Path] = (),
    output: Path = Path("results/ideas.csv"),
    ideas: Sequence[str] = tuple(IDEAS),
    seeds: Sequence[int] | None = None,
    steps: int = 800,
) -> str:
    """Fit the first model of each grid with each idea, on all data and seeds; what is stored isn't run again.

    Args:
        grids: YAML grids of a light student without projection. Without any, what is stored is shown.
        output: CSV file, appended to.
        ideas: Names of those in the module.
        seeds: Those of the grid by default.
        steps: Length of each fit and of its schedule.

    Returns:
        A table.

    Raises:
        ValueError: If the model is another one.
    """
    results = ideas_results(output)
    for grid in map(read_grid, grids):
        name = next(iter(grid["models"]))
        for data in grid["data"]:
            same = {"data": data, "model": name, "steps": steps, "batch_size": grid["batch_size"]}
            rows = [{**same, "idea": idea, "seed": seed} for idea in ideas for seed in seeds or grid["seeds"]]
            if all(map(results.done, rows)):
                continue
            model = build_model(grid, name)
            is_light = isinstance(model, RDPP) and isinstance(model.model.student, LightStudent)
            if not is_light or model.hparams.get("projection") or model.hparams["recipe"] != "fast":
                msg = f"Ideas are for light students without projection, but {name} is no such model of recipe fast."
                raise ValueError(msg)
            datamodule = build_datamodule(grid, data)
            train, _ = extract(model, datamodule.train_data)
            test, truth = extract(model, datamodule.test_data)
            for row in tqdm(rows, desc=f"ideas on {data}"):
                if not results.done(row):
                    with results.run({**row, "commit": commit()}):
                        found = fit(deepcopy(model), IDEAS[row["idea"]], train, test, truth, row)
                        results.append({**row, "commit": commit(), **found})
    return ideas_table(results)


@torch.no_grad()
def extract(model: Any, dataset: AnomalibDataset) -> tuple[Features, SimpleNamespace]:  # noqa: ANN401
    """Give the teacher's features of all images, and their masks, labels and kinds of defect."""
    resize, dataset.augmentations = model.pre_processor.transform, None
    read_right(dataset)
    features, masks, labels = [], [], []
    for item in tqdm(dataset, total=len(dataset), desc="features", leave=False):
        image = resize(item.image).clamp(0, 1)
        features.append(model.model.teacher(image[None]))
        mask = torch.zeros(image.shape[1:]) if item.gt_mask is None else item.gt_mask
        masks.append(resize(mask[None].float())[0] > 0.5)
        labels.append(int(item.gt_label))
    kinds = [Path(path).parent.name for path in dataset.samples["image_path"]]
    truth = SimpleNamespace(masks=torch.stack(masks), labels=torch.tensor(labels), kinds=kinds)
    return [torch.cat(scale) for scale in zip(*features, strict=True)], truth


def fit(
    model: RDPP, idea: Idea, train: Features, test: Features, truth: SimpleNamespace, row: dict[str, Any]
) -> dict[str, Any]:
    """Train a student with an idea, and test it."""
    seed_everything(row["seed"], verbose=False)
    student = model.model.student
    prepare(student, idea)
    rate, steps = model.learning_rates[1] * idea.rate, row["steps"]
    optimizer = build_optimizer(model, [student], [rate])
    optimizer.param_groups[0]["weight_decay"] = idea.decay
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(idea.averaged)) if idea.averaged else None
    loss, order, start = RDPPLoss(), torch.empty(0, dtype=torch.long), time.process_time()
    draw = torch.Generator().manual_seed(row["seed"])  # the same images for all ideas
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * cosine_factor(step / steps)
        if not len(order):
            order = torch.randperm(len(train[0]), generator=draw)
        batch, order = order[: row["batch_size"]], order[row["batch_size"] :]
        target = [scale[batch] for scale in train]
        compared = student.compared(target, is_counted=True)
        seen = [scale + idea.jitter * noise_like(scale) for scale in target] if idea.jitter else target
        terms = loss(RDPPFeatures(compared, [], [], [], student(seen)), easy_share(step / steps))
        optimizer.zero_grad()
        terms["loss"].backward()
        if idea.clip < torch.inf:
            nn.utils.clip_grad_norm_(student.parameters(), idea.clip)
        optimizer.step()
        if average is not None:
            average.update_parameters(student)
    minutes = (time.process_time() - start) / 60
    tested = student if average is None else average.module
    return {"fit_minutes": round(minutes, 2), **rate_maps(tested.eval(), test, truth)}


def prepare(student: Student, idea: Idea) -> None:
    """Draw a student's weights anew, with an idea's layers."""
    for module in student.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if isinstance(module, nn.BatchNorm2d):
            module.eps = idea.eps
    student.bottleneck.append(nn.Dropout2d(idea.dropout))
    student.train()


def noise_like(features: torch.Tensor) -> torch.Tensor:
    """Draw noise of the length of each feature, in the mean."""
    return torch.randn_like(features) * features.square().mean(1, keepdim=True).sqrt()


@torch.no_grad()
def rate_maps(student: Student, test: Features, truth: SimpleNamespace) -> dict[str, Any]:
    """Compute AUROC of the scores, of the last that the student has for each kind of defect, and AUPRO."""
    size, count = tuple(truth.masks.shape[-2:]), len(SCORES) if student.standardise else len(SCORES) - 1
    generators = {name: AnomalyMapGenerator(score=score) for name, score in list(SCORES.items())[:count]}
    scores: dict[str, list[torch.Tensor]] = {name: [] for name in generators}
    maps = []
    for start in range(0, len(truth.labels), 16):
        teacher = [scale[start : start + 16] for scale in test]
        pair = student.compared(teacher), student(teacher)
        for name, generate in generators.items():
            own = pair if name == "AUROC_standardised" else [scales[: len(student.scales)] for scales in pair]
            answer = generate(*own, size)
            scores[name].append(answer.pred_score)
        maps.append(answer.anomaly_map[:, 0])
    metric = AUPRO(fields=["anomaly_map", "gt_mask"])
    metric.update(SimpleNamespace(anomaly_map=torch.cat(maps), gt_mask=truth.masks))
    values = {name: torch.cat(each).double() / 8 for name, each in scores.items()}  # none is above 6
    found = {name: auroc(each, truth.labels, "binary") for name, each in values.items()} | {"AUPRO": metric.compute()}
    kinds = {}
    for kind in sorted({kind for kind, label in zip(truth.kinds, truth.labels, strict=True) if label}):
        own = torch.tensor([each == kind for each in truth.kinds]) | (truth.labels == 0)
        kinds[kind] = auroc(values[next(reversed(generators))][own], truth.labels[own], "binary")
    by_kind = ", ".join(f"{kind} {100 * value:.1f}" for kind, value in kinds.items())
    return {**{name: round(float(value), 4) for name, value in found.items()}, "by_kind": by_kind}


def ideas_table(results: Results) -> str:
    """Make a Markdown table: mean and deviation of seeds in percent."""
    rows = results.frame()
    lines = []
    groups = rows[rows["error"] == ""].groupby(["data", "model", "idea", "steps"], sort=False)
    for (data, model, idea, steps), own in groups:
        line = {"data": data, "model": model, "idea": idea, "steps": str(steps), "seeds": str(len(own))}
        for name in (*SCORES, "AUPRO"):
            known = own[name].notna().any()
            line[name.replace("_", " ")] = mean_and_spread(100 * own[name]) if known else "-"
        lines.append(line | {"CPU minutes": f"{own['fit_minutes'].median():.1f}"})
    return markdown(lines)


if __name__ == "__main__":
    run("python -m experiments.ideas", run_ideas)
