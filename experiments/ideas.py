"""Ideas for the cascade of configs/rdpp_fast.yaml, each alone: fits on teacher features that are computed once.

python -m experiments.ideas experiments/configs/cascade_batch_8.yaml --output experiments/results/ideas.csv

A fit is the package's student, loss, optimiser and schedule without Lightning around them; what an idea changes stands
in ``IDEAS``.
"""

import time
from collections.abc import Callable, Sequence
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
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics.functional import auroc
from tqdm import tqdm

from anomalib_rdpp.benchmark.build import build_datamodule, build_model
from anomalib_rdpp.benchmark.cli import run
from anomalib_rdpp.benchmark.grid import read_grid
from anomalib_rdpp.benchmark.report import mean_and_spread
from anomalib_rdpp.benchmark.results import Results, commit, markdown
from anomalib_rdpp.rdpp.lightning_model import LEARNING_RATES
from anomalib_rdpp.rdpp.loss import RDPPLoss
from anomalib_rdpp.rdpp.torch_model import RDPPFeatures, RDPPModel
from anomalib_rdpp.recipe import cosine_factor, easy_share

SCORES = {"AUROC_coarsest": 1, "AUROC_two_coarsest": 2, "AUROC_all": 3}  # of how many scales, coarse to fine
KEY = ("data", "idea", "seed", "steps")
NUMBERS = (*KEY[2:], "fit_minutes", *SCORES, "AUPRO")
COLUMNS = (*KEY, *NUMBERS[2:], "by_kind", "batch_size", "commit", "error")
ideas_results = partial(Results, "experiments.ideas", COLUMNS, KEY, NUMBERS)

Features = list[torch.Tensor]


@dataclass(frozen=True)
class Idea:
    """What differs from the config."""

    target: str = "as they are"  # or centred, standardised, whitened: features by the training images' statistics
    constant: float = 0.0  # one more channel of both that are compared, relative to the features' mean length
    shrinkage: float = 0.1  # of whitening: share of the mean variance that is added to each
    clip: float = torch.inf  # norm of the gradient
    averaged: float = 0.0  # decay of a moving average of the weights, which is what is tested
    dropout: float = 0.0  # of the bottleneck's channels
    jitter: float = 0.0  # noise on what the student sees, relative to the length of each feature
    eps: float = 1e-5  # of BatchNorm
    rate: float = 1.0  # factor on the learning rate
    decay: float = 1e-5  # of the weights
    easy: float = 0.1  # gradient of easy positions


IDEAS = {
    "as it is": Idea(),
    "centred": Idea("centred"),
    "centred, constant 1": Idea("centred", constant=1.0),
    "standardised": Idea("standardised"),
    "standardised, constant 1": Idea("standardised", constant=1.0),
    "standardised, constant 3": Idea("standardised", constant=3.0),
    "whitened": Idea("whitened"),
    "whitened, constant 1": Idea("whitened", constant=1.0),
    "clip 0.1": Idea(clip=0.1),
    "averaged weights": Idea(averaged=0.99),
    "dropout 0.1": Idea(dropout=0.1),
    "jitter 0.2": Idea(jitter=0.2),
    "BatchNorm eps 1e-8": Idea(eps=1e-8),
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
        grids: YAML grids of a cascade without projection. Without any, what is stored is shown.
        output: CSV file, appended to.
        ideas: Names of those in the module.
        seeds: Those of the grid by default.
        steps: Length of each fit and of its schedule.

    Returns:
        A table.
    """
    results = ideas_results(output)
    for grid in map(read_grid, grids):
        for data in grid["data"]:
            rows = [
                {"data": data, "idea": idea, "seed": seed, "steps": steps, "batch_size": grid["batch_size"]}
                for idea in ideas
                for seed in seeds or grid["seeds"]
            ]
            if all(map(results.done, rows)):
                continue
            model = build_model(grid, next(iter(grid["models"])))
            datamodule = build_datamodule(grid, data)
            train, _ = extract(model, datamodule.train_data)
            test, truth = extract(model, datamodule.test_data)
            for row in tqdm(rows, desc=f"ideas on {data}"):
                if not results.done(row):
                    with results.run({**row, "commit": commit()}):
                        found = fit(deepcopy(model.model), IDEAS[row["idea"]], train, test, truth, row)
                        results.append({**row, "commit": commit(), **found})
    return ideas_table(results)


@torch.no_grad()
def extract(model: Any, dataset: AnomalibDataset) -> tuple[Features, SimpleNamespace]:  # noqa: ANN401
    """Give the teacher's features of all images, and their masks, labels and kinds of defect."""
    resize, dataset.augmentations = model.pre_processor.transform, None
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
    network: RDPPModel, idea: Idea, train: Features, test: Features, truth: SimpleNamespace, row: dict[str, Any]
) -> dict[str, Any]:
    """Train a student with an idea, and test it."""
    seed_everything(row["seed"], verbose=False)
    change = [affine(scale, idea) for scale in train]
    targets = [each(scale) for each, scale in zip(change, train, strict=True)]
    constants = [idea.constant * float(scale.square().sum(1).mean().sqrt()) for scale in targets]
    student = prepare(network, idea)
    rate, steps = LEARNING_RATES["fast"][1] * idea.rate, row["steps"]
    options = {"betas": (0.9, 0.999), "eps": 1e-10, "fused": True}  # as the recipe's
    optimizer = AdamW(student.parameters(), rate, weight_decay=idea.decay, **options)
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(idea.averaged or 0.5))
    loss, order, start = RDPPLoss(), torch.empty(0, dtype=torch.long), time.process_time()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * cosine_factor(step / steps)
        if not len(order):
            order = torch.randperm(len(train[0]))
        batch, order = order[: row["batch_size"]], order[row["batch_size"] :]
        target = [scale[batch] for scale in targets]
        seen = [scale + idea.jitter * noise_like(scale) for scale in target] if idea.jitter else target
        compared = [lengthen(scales, constants) for scales in (target, student(seen))]
        terms = loss(RDPPFeatures(compared[0], [], [], [], compared[1]), easy_share(step / steps))
        optimizer.zero_grad()
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(student.parameters(), idea.clip)
        optimizer.step()
        if idea.averaged:
            average.update_parameters(student)
    minutes = (time.process_time() - start) / 60
    if idea.averaged:
        student = average.module
    return {"fit_minutes": round(minutes, 2), **rate_maps(network, student.eval(), change, constants, test, truth)}


def prepare(network: RDPPModel, idea: Idea) -> nn.Module:
    """Draw a student's weights anew, with an idea's layers."""
    for module in network.student.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if isinstance(module, nn.BatchNorm2d):
            module.eps = idea.eps
    network.student.bottleneck.append(nn.Dropout2d(idea.dropout))
    return network.student.train()


def affine(features: torch.Tensor, idea: Idea) -> Callable[[torch.Tensor], torch.Tensor]:
    """Make the function that changes features ``(B, C, H, W)`` by the statistics of those of the training images."""
    rows = features.transpose(0, 1).flatten(1).double()  # (C, N)
    mean, covariance = rows.mean(1), torch.cov(rows)
    matrix = torch.eye(len(mean), dtype=torch.double)
    if idea.target == "as they are":
        mean = torch.zeros_like(mean)
    elif idea.target == "standardised":
        matrix = covariance.diag().rsqrt().diag()
    elif idea.target == "whitened":
        values, vectors = torch.linalg.eigh(covariance)
        matrix = vectors @ (values + idea.shrinkage * values.mean()).rsqrt().diag() @ vectors.T
    matrix, offset = matrix.float(), (-matrix @ mean).float()
    if idea.target == "as they are":
        return lambda scale: scale
    return lambda scale: torch.einsum("dc,bchw->bdhw", matrix, scale) + offset[:, None, None]


def lengthen(scales: Features, constants: Sequence[float]) -> Features:
    """Add a channel of a constant to each scale ``(B, C, H, W)``, so that short features turn less."""
    pairs = zip(scales, constants, strict=True)
    return [torch.cat([each, torch.full_like(each[:, :1], constant)], 1) for each, constant in pairs]


def noise_like(features: torch.Tensor) -> torch.Tensor:
    """Draw noise of the length of each feature, in the mean."""
    return torch.randn_like(features) * features.square().mean(1, keepdim=True).sqrt()


@torch.no_grad()
def rate_maps(
    network: RDPPModel,
    student: nn.Module,
    change: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    constants: Sequence[float],
    test: Features,
    truth: SimpleNamespace,
) -> dict[str, Any]:
    """Compute AUROC of the scores of one, two and three scales, of each kind of defect by one, and AUPRO."""
    generate, size = network.anomaly_map_generator, tuple(truth.masks.shape[-2:])
    maps: list[torch.Tensor] = []
    for start in range(0, len(truth.labels), 16):
        teacher = [each(scale[start : start + 16]) for each, scale in zip(change, test, strict=True)]
        pairs = list(zip(lengthen(teacher, constants), lengthen(student(teacher), constants), strict=True))
        counts = [pairs[-count:] for count in SCORES.values()]
        maps.append(torch.stack([generate(*zip(*own, strict=True), size).anomaly_map[:, 0] for own in counts]))
    by_count = torch.cat(maps, dim=1)  # (3, N, H, W)
    top = round(generate.score_fraction * by_count[0, 0].numel())
    scores = by_count.flatten(2).double().topk(top).values.mean(2)
    scores = scores / (1 + scores)
    found = {name: auroc(each, truth.labels, "binary") for name, each in zip(SCORES, scores, strict=True)}
    metric = AUPRO(fields=["anomaly_map", "gt_mask"])
    metric.update(SimpleNamespace(anomaly_map=by_count[-1], gt_mask=truth.masks))
    found = {name: round(float(value), 4) for name, value in {**found, "AUPRO": metric.compute()}.items()}
    kinds = {}
    for kind in sorted({kind for kind, label in zip(truth.kinds, truth.labels, strict=True) if label}):
        own = torch.tensor([each == kind for each in truth.kinds]) | (truth.labels == 0)
        kinds[kind] = auroc(scores[0, own], truth.labels[own], "binary")
    return {**found, "by_kind": ", ".join(f"{kind} {100 * value:.1f}" for kind, value in kinds.items())}


def ideas_table(results: Results) -> str:
    """Make a Markdown table: mean and deviation of seeds in percent."""
    rows = results.frame()
    lines = []
    for (data, idea, steps), own in rows[rows["error"] == ""].groupby(["data", "idea", "steps"], sort=False):
        line = {"data": data, "idea": idea, "steps": str(steps), "seeds": str(len(own))}
        line |= {name.replace("_", " "): mean_and_spread(100 * own[name]) for name in (*SCORES, "AUPRO")}
        lines.append(line | {"CPU minutes": f"{own['fit_minutes'].median():.1f}"})
    return markdown(lines)


if __name__ == "__main__":
    run("python -m experiments.ideas", run_ideas)
