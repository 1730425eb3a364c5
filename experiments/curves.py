"""Accuracy over the minutes of training: a model is tested every few epochs of one fit, one CSV row each time.

python -m experiments.curves experiments/configs/curves.yaml --output results/curves.csv --pictures results

The time of the tests isn't counted. The weights at the end of each fit, without the optimiser's state, stay in `curves`
beside the CSV. A fit whose last epoch is in the CSV is not run again; one that was cut short or failed starts anew.
Several processes fill a GPU, which one fit of a ResNet-18 leaves idle most of the time; then each image is read once by
each process and kept in memory, and minutes tell nothing.
"""

import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Batch
from anomalib.engine import Engine
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch import Callback
from lightning.pytorch.cli import instantiate_class
from torchmetrics.functional import auroc
from tqdm import tqdm

from anomalib_rdpp.benchmark.build import METRICS, build_datamodule, build_model, in_row
from anomalib_rdpp.benchmark.cli import run
from anomalib_rdpp.benchmark.grid import epochs_of, read_grid, run_folder, runs_of
from anomalib_rdpp.benchmark.report import mean_and_spread
from anomalib_rdpp.benchmark.results import Results, commit, markdown
from anomalib_rdpp.pixels import read_right
from anomalib_rdpp.synthesis.blending import TextureAnomalies

logger = logging.getLogger(__name__)

KEY = ("data", "model", "seed", "epoch", "image_size", "batch_size")
TOPS = {"AUROC_top_permille": 0.001, "AUROC_top_percent": 0.01, "AUROC_sum": 1.0}  # shares of the map's pixels
TEXTURE = "AUROC_texture"  # normal test images and the same with made-up anomalies
NUMBERS = ("epoch", "steps", "fit_minutes", *METRICS, "val_distance", *TOPS, TEXTURE)
COLUMNS = (*KEY, *NUMBERS[1:], "commit", "error")  # image_AUROC is that of the model's own score, other scores beside
SHOWN = ("image_AUROC", "pixel_AUPRO")
curves_results = partial(Results, "experiments.curves", COLUMNS, KEY, NUMBERS)


def run_curves(
    grids: Sequence[Path] = (),
    output: Path = Path("results/curves.csv"),
    pictures: Path = Path("results"),
    processes: int = 1,
    over_steps: bool = False,
) -> list[Any]:
    """Test models every few epochs: accuracy over minutes of training.

    Args:
        grids: YAML files as of accuracy, with `every`, the epochs from test to test, which data or a model may have
            of their own; and `callbacks` of a model, a list of `class_path` and `init_args`. Without
            any, what is stored is shown.
        output: CSV file, appended to; rows in it are kept.
        pictures: Folder for pictures.
        processes: Fits at a time, on a GPU.
        over_steps: Draw over steps and not over minutes.

    Returns:
        A table and the pictures.

    Raises:
        ValueError: If a grid doesn't say how often to test, or not so that the last epoch is tested.
    """
    results, fits = curves_results(output), []
    for path in grids:
        grid = read_grid(path)
        for data, model, seed in runs_of(grid):
            if epochs_of(grid, data, model) % _every(grid, data, model):
                msg = f"'{path}' needs `every`, the epochs from test to test, which divides the epochs of all models."
                raise ValueError(msg)
            fits.append((grid, data, model, seed, output, processes > 1))
    if processes > 1:
        try:
            with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
                list(pool.map(_fit_unless_done, *zip(*fits, strict=True)))
        except BrokenProcessPool:  # out of memory, most of the time
            logger.exception("a process died: run the rest again, with fewer")
    else:
        for fit in fits:
            _fit_unless_done(*fit)
    rows = _rows_of(results)
    return [curves_table(rows), "", *draw_curves(rows, pictures, "steps" if over_steps else "fit_minutes")]


def _every(grid: dict[str, Any], data: str, model: str) -> float:
    """Epochs from test to test."""
    return {**grid, **grid["data"][data], **grid["models"][model]}.get("every", math.inf)


def _fit_unless_done(grid: dict[str, Any], data: str, model: str, seed: int, output: Path, keep: bool) -> None:
    """Train one model and note its rows, or its error."""
    results, sizes = curves_results(output), {name: grid[name] for name in ("image_size", "batch_size")}
    row = {"data": data, "model": model, "seed": seed, **sizes, "commit": commit()}
    if results.done({**row, "epoch": epochs_of(grid, data, model)}):
        return
    logger.warning("%s on %s, seed %d", model, data, seed)
    with results.run({**row, "epoch": 0}):
        _fit(grid, data, model, seed, Curve(results, row), keep)


class Curve(Callback):
    """Note the CPU minutes of training and the metrics of each test, which is anomalib's validation.

    Beside the AUROC of the model's own score stands that of the mean of the map's highest pixels, and of its sum; and
    how well the score tells normal test images from themselves with made-up anomalies, which needs no defects.
    """

    def __init__(self, results: Results, row: dict[str, Any]) -> None:
        self.results, self.row = results, row
        self.seconds = self.start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        del pl_module
        self.bar = tqdm(total=trainer.max_epochs, desc=f"{self.row['model']} on {self.row['data']}", unit="epoch")
        self.start = time.process_time()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show how far it is."""
        del pl_module
        self.bar.update(trainer.current_epoch - self.bar.n)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        del trainer, pl_module
        self.seconds += time.process_time() - self.start
        self.scores: list[torch.Tensor] = []
        self.made_up: list[torch.Tensor] = []

    @torch.no_grad()
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Batch, batch: Batch, batch_idx: int, *args: object
    ) -> None:
        """Score the maps in other ways than the model does, and normal images with the same anomalies each time."""
        del trainer, batch, args
        is_normal = ~outputs.gt_label.bool()
        if is_normal.any():
            with torch.random.fork_rng():
                torch.manual_seed(batch_idx)
                images = TextureAnomalies(probability=1)(outputs.image[is_normal])[0]
            pairs = [outputs.pred_score[is_normal], pl_module.model(images).pred_score]
            self.made_up += [torch.stack([each, torch.full_like(each, i)], 1) for i, each in enumerate(pairs)]
        pixels = outputs.anomaly_map.flatten(1).double()
        tops = [pixels.topk(max(1, round(share * pixels.shape[1])))[0].mean(1) for share in TOPS.values()]
        self.scores.append(torch.stack([*tops, outputs.gt_label], dim=1))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a row, go on with the clock."""
        del pl_module
        known, images = trainer.callback_metrics, trainer.datamodule.val_data
        row = {"epoch": trainer.current_epoch + 1, "steps": trainer.global_step} | in_row(
            known, images, self.row["data"]
        )
        *tops, labels = torch.cat(self.scores).T
        found = {name: (scores, labels) for name, scores in zip(TOPS, tops, strict=True)}
        found |= {TEXTURE: torch.cat(self.made_up).double().T} if self.made_up else {}
        for name, (scores, truth) in found.items():
            row[name] = round(float(auroc(scores / (1 + scores), truth.long(), "binary")), 4)
        if "val_distance" in known:
            row["val_distance"] = round(float(known["val_distance"]), 4)
        self.results.append({**self.row, "fit_minutes": round(self.seconds / 60, 3), **row})
        self.bar.set_postfix({name: row.get(name) for name in SHOWN}, refresh=False)
        self.start = time.process_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar full."""
        del pl_module
        self.bar.update(trainer.current_epoch - self.bar.n)
        self.bar.close()


def _fit(grid: dict[str, Any], data: str, model: str, seed: int, curve: Curve, keep: bool) -> None:
    """Train one model, test it every few epochs."""
    seed_everything(seed, workers=True)
    datamodule, folder = build_datamodule(grid, data), curve.results.path.parent
    datamodule.val_data = datamodule.test_data
    for dataset in (datamodule.train_data, datamodule.val_data) if keep else ():
        if dataset.augmentations is None:  # they come out of the dataset anew each time
            read_right(dataset)
            dataset.kept_items = {}
    own = grid["models"][model]
    options = {"enable_progress_bar": False, **grid.get("trainer", {}), **own.get("trainer", {})}
    others = [instantiate_class((), each) for each in own.get("callbacks", ())]
    engine = Engine(
        max_epochs=epochs_of(grid, data, model),
        check_val_every_n_epoch=_every(grid, data, model),
        default_root_dir=folder / "curves",
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[curve, ModelCheckpoint(folder, save_top_k=0), *others],
        **options,
    )
    engine.fit(build_model(grid, model), datamodule=datamodule)
    engine.trainer.save_checkpoint(
        run_folder(grid, data, model, seed, folder / "curves") / "last.ckpt", weights_only=True
    )


def _rows_of(results: Results) -> pd.DataFrame:
    """Read the rows that didn't fail; of a fit that was begun twice, the later ones."""
    rows = results.frame()
    return rows[rows["error"] == ""].sort_values("epoch", kind="stable")


def curves_table(rows: pd.DataFrame) -> str:
    """Make a Markdown table of each setting's end, and of when it came to where the first one ended.

    Means and deviations are over seeds in percent, at the last epoch that all of them have; minutes are those of the
    CPU, without tests.
    """
    lines = []
    for (data, _), own in rows.groupby(["data", "image_size"], sort=False):
        ends: dict[str, float] = {}
        for (model, _), runs in own.groupby(["model", "batch_size"], sort=False):
            common = runs[runs.groupby("epoch")["seed"].transform("nunique") == runs["seed"].nunique()]
            common = runs if common.empty else common
            curve = common.groupby("epoch")[["fit_minutes", *SHOWN]].mean()
            ends = ends or {name: curve[name].iloc[-1] for name in SHOWN}
            reached = [curve.loc[curve[name] >= end, "fit_minutes"].min() for name, end in ends.items()]
            last = common[common["epoch"] == curve.index[-1]]
            line = {"data": data, "model": model, "seeds": str(len(last)), "epochs": str(curve.index[-1])}
            line |= {"steps": f"{last['steps'].iloc[0]:.0f}", "minutes": f"{last['fit_minutes'].mean():.1f}"}
            line |= {name.replace("_", " "): mean_and_spread(100 * last[name]) for name in METRICS[:3]}
            for name, minutes in zip(("minutes to the first's AUROC", "its AUPRO"), reached, strict=True):
                line[name] = "-" if pd.isna(minutes) else f"{minutes:.1f}"
            lines.append(line)
    return markdown(lines)


def draw_curves(rows: pd.DataFrame, pictures: Path, over: str = "fit_minutes") -> list[Path]:
    """Draw image AUROC and AUPRO over CPU minutes or steps, a picture for each data set and size.

    Thick lines are means of seeds, thin ones each of them. Models with fewer seeds than the first are left out, and so
    are low values of the first test.
    """
    pictures.mkdir(parents=True, exist_ok=True)
    files = []
    for (data, size), own in rows.groupby(["data", "image_size"], sort=False):
        seeds = own.groupby("model", sort=False)["seed"].nunique()
        shown = own[own["model"].isin(seeds.index[seeds >= seeds.iloc[0]])]
        figure, axes = plt.subplots(1, len(SHOWN), figsize=(12, 5), layout="constrained")
        for axis, metric in zip(axes, SHOWN, strict=True):
            if shown[metric].isna().all():  # no masks
                continue
            for i, ((model, _), runs) in enumerate(shown.groupby(["model", "batch_size"], sort=False)):
                colour = plt.get_cmap("tab10")(i % 10)
                for _, each in runs.groupby("seed"):
                    axis.plot(each[over], 100 * each[metric], color=colour, alpha=0.3, linewidth=0.8)
                curve = runs.groupby("epoch")[[over, metric]].mean()
                axis.plot(curve[over], 100 * curve[metric], ".-", color=colour, label=model)
            low = min(shown[metric].quantile(0.1), shown.loc[shown["epoch"] > shown["epoch"].min(), metric].min())
            axis.set_ylim(bottom=100 * low - 0.1)
            axis.set_xlabel({"steps": "steps", "fit_minutes": "CPU minutes of training"}[over])
            axis.set_ylabel(f"{metric.replace('_', ' ')} in %")
            axis.grid(alpha=0.3)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
        said = "one seed" if seeds.iloc[0] == 1 else f"mean of {seeds.iloc[0]} seeds (thin: each)"
        figure.suptitle(f"{data}, {size} px: {said}")
        files.append(pictures / f"curves_{data.replace('/', '_')}_{size}px.png")
        figure.savefig(files[-1], dpi=110)
        plt.close(figure)
    return files


if __name__ == "__main__":
    run("python -m experiments.curves", run_curves)
