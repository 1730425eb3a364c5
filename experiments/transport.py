"""What the transport term of RD++ does to the projection while it trains: gradients, and spread between images.

python -m experiments.curves experiments/configs/transport.yaml --output experiments/results/transport_curves.csv
python -m experiments.transport experiments/results/transport.csv experiments/results/transport_curves.csv

The grid's callback writes the first of the two files.
"""

import os
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from anomalib.data import ImageBatch
from lightning import Trainer
from lightning.pytorch import Callback
from torch.nn import functional

from anomalib_rdpp import RDPP
from anomalib_rdpp.benchmark.cli import run
from anomalib_rdpp.benchmark.report import mean_and_spread
from anomalib_rdpp.benchmark.results import Results, commit, markdown
from anomalib_rdpp.rdpp.loss import PUBLISHED_WEIGHTS, transport_loss

from .curves import curves_results

KEY = ("data", "transport_weight", "seed", "steps")
TERMS = ("distillation", "reconstruction", "contrast", "transport")
GRADIENTS = tuple(f"gradient_{term}" for term in TERMS)
SPREADS = ("teacher_between", "projected_between", "teacher_within", "projected_within")
NUMBERS = (*KEY[1:], *GRADIENTS, *SPREADS, "distillation")
COLUMNS = (*KEY, *NUMBERS[3:], "image_size", "batch_size", "commit", "error")
transport_results = partial(Results, "experiments.curves", COLUMNS, KEY, NUMBERS)


class TransportProbe(Callback):
    """Note, every few steps, each term's gradient and how far the features of images differ.

    Gradients are norms over the projection's parameters, each term with its weight in the loss, transport's with a
    weight of 1 whatever the model has; images and noise are those of the step, transport's positions others. Training
    isn't changed: neither generators nor running statistics move.

    Args:
        output: CSV file, appended to.
        every: Steps from probe to probe.
    """

    def __init__(self, output: str, every: int = 50) -> None:
        self.results, self.every = transport_results(Path(output)), every

    def on_train_batch_start(self, trainer: Trainer, pl_module: RDPP, batch: ImageBatch, batch_idx: int) -> None:
        """Write a row."""
        del batch_idx
        if trainer.global_step % self.every:
            return
        before = [buffer.clone() for buffer in pl_module.model.buffers()]
        with torch.random.fork_rng():
            features = pl_module.model(batch.image, pl_module.noise(batch.image))
            terms = pl_module.loss(features) | {"transport": transport_loss(features.projected)}
            weights = pl_module.loss.weights | {"transport_weight": 1.0}
            parameters = list(pl_module.model.projections.parameters())
            norms = {}
            for name, term in zip(GRADIENTS, TERMS, strict=True):
                gradients = torch.autograd.grad(terms[term], parameters, retain_graph=True, allow_unused=True)
                norm = torch.stack([each.norm() for each in gradients if each is not None]).norm()
                share = weights["projection_weight"] / PUBLISHED_WEIGHTS
                norms[name] = float(norm) * (1 if term == "distillation" else share * weights[f"{term}_weight"])
            pairs = [spread(scales) for scales in (features.teacher, features.projected)]
        for buffer, value in zip(pl_module.model.buffers(), before, strict=True):
            buffer.copy_(value)
        spreads = dict(zip(SPREADS, (value for kind in zip(*pairs, strict=True) for value in kind), strict=True))
        row = {name: f"{value:.6g}" for name, value in (norms | spreads).items()}
        row |= {"distillation": f"{float(terms['distillation'].detach()):.6g}", "commit": commit()}
        row |= {"data": trainer.datamodule.name, "transport_weight": pl_module.hparams["transport_weight"]}
        row |= {"seed": os.environ["PL_GLOBAL_SEED"], "steps": trainer.global_step}
        self.results.append(row | {"image_size": batch.image.shape[-1], "batch_size": len(batch.image)})


@torch.no_grad()
def spread(scales: list[torch.Tensor]) -> tuple[float, float]:
    """Tell how far images differ from each other, and the positions of an image from each other.

    Args:
        scales: Features ``(B, C, H, W)`` per scale.

    Returns:
        Mean of the scales: Sinkhorn divergence of pairs of images, which is the transport term, and the mean variance
        of the features of an image as unit vectors, at most 1.
    """
    units = [functional.normalize(scale.flatten(2), dim=1) for scale in scales]  # (B, C, N)
    within = [unit.var(2, correction=0).sum(1).mean() for unit in units]
    return float(transport_loss(scales).detach()) / len(scales), float(torch.stack(within).mean())


def run_transport(results: Path, curves: Path, picture: Path = Path("docs/images/transport.png")) -> list[str]:
    """Draw what the projection gives while it trains, a row for each data set, and show the end of each run.

    Args:
        results: What the grid's callback wrote.
        curves: What `experiments.curves` wrote.
        picture: File for the picture.

    Returns:
        A table and the picture's path.
    """
    rows, tests = transport_results(results).frame(), curves_results(curves).frame()
    tests = tests[tests["error"] == ""]
    tests = tests.assign(transport_weight=tests["model"].str.rsplit(n=1).str[-1].astype(float))
    panels = {
        "image AUROC of test images, %": (tests, lambda own: 100 * own["image_AUROC"]),
        "divergence of images, projection / teacher": (rows, lambda own: own[SPREADS[1]] / own[SPREADS[0]]),
        "distillation loss": (rows, lambda own: own["distillation"]),
        "gradient of transport (weight 1) / distillation": (rows, lambda own: own[GRADIENTS[3]] / own[GRADIENTS[0]]),
    }
    data = list(rows["data"].unique())
    size = (16, 3.4 * len(data))
    figure, axes = plt.subplots(len(data), len(panels), figsize=size, squeeze=False, layout="constrained")
    for line, each in zip(axes, data, strict=True):
        for axis, (title, (frame, value)) in zip(line, panels.items(), strict=True):
            for weight, own in frame[frame["data"] == each].groupby("transport_weight"):
                mean = own.assign(value=value(own)).groupby("steps")["value"].mean()
                axis.plot(mean.index, mean, ".-", label=f"transport_weight {weight:g}")
            axis.set(title=f"{each}: {title}", xlabel="steps")
            axis.title.set_fontsize(9)
            axis.grid(alpha=0.3)
            if not title.startswith("image"):
                axis.set_yscale("log")
    axes[0][0].legend(fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=90)
    plt.close(figure)
    return [_table(rows, tests), "", str(picture)]


def _table(rows: pd.DataFrame, tests: pd.DataFrame) -> str:
    """Show the last test and the last probe of each run, mean of seeds."""
    lines = []
    for (data, weight), own in rows.groupby(["data", "transport_weight"], sort=False):
        end = own[own["steps"] == own["steps"].max()].mean(numeric_only=True)
        tested = tests[(tests["data"] == data) & (tests["transport_weight"] == weight)]
        last = tested[tested["steps"] == tested["steps"].max()]
        line = {"data": data, "weight": f"{weight:g}", "steps": f"{last['steps'].max():.0f}", "seeds": str(len(last))}
        line |= {name.replace("_", " "): mean_and_spread(100 * last[name]) for name in ("image_AUROC", "pixel_AUPRO")}
        line |= {kind: f"{end[f'projected_{kind}'] / end[f'teacher_{kind}']:.3f}" for kind in ("between", "within")}
        line |= {"distillation": f"{end['distillation']:.4f}"}
        line |= {f"{name} / distillation": f"{end[f'gradient_{name}'] / end[GRADIENTS[0]]:.3g}" for name in TERMS[1:]}
        lines.append(line)
    return markdown(lines)


if __name__ == "__main__":
    run("python -m experiments.transport", run_transport)
