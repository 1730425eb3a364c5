"""Accuracy over the minutes of training: a model is tested every few epochs of one fit, one CSV row each time.

The time of the tests isn't counted. A fit whose last epoch is in the CSV is not run again; one that was cut short
starts anew.
"""

import logging
import math
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from anomalib.callbacks import ModelCheckpoint
from anomalib.engine import Engine
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch import Callback
from lightning.pytorch.cli import instantiate_class

from .accuracy import METRICS, runs_of
from .grid import build_datamodule, build_model, epochs_of, read_grid, trainer_options
from .rows import append_row, commit, read_rows

logger = logging.getLogger(__name__)

KEY = ("data", "model", "seed", "epoch", "image_size", "batch_size")
COLUMNS = (*KEY, "steps", "fit_minutes", *METRICS, "val_distance", "commit")
SHOWN = ("image_AUROC", "pixel_AUPRO")


class Curve(Callback):
    """Note the CPU minutes of training and the metrics of each test, which is the host's validation."""

    def __init__(self, output: Path, facts: dict[str, Any]) -> None:
        self.output = output
        self.facts = facts
        self.seconds = 0.0
        self.start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        del trainer, pl_module
        self.start = time.process_time()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        del trainer, pl_module
        self.seconds += time.process_time() - self.start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a row, go on with the clock."""
        del pl_module
        known = trainer.callback_metrics
        row = {name: round(float(known[name]), 4) for name in (*METRICS, "val_distance") if name in known}
        progress = {"epoch": trainer.current_epoch + 1, "steps": trainer.global_step}
        append_row(self.output, COLUMNS, {**self.facts, **progress, "fit_minutes": round(self.seconds / 60, 3), **row})
        self.start = time.process_time()


def run_curves(config: Path, output: Path) -> None:
    """Run the fits of a grid whose last epoch ``output`` doesn't hold yet.

    Args:
        config: YAML as of the accuracy benchmark, with ``every``, the epochs from test to test; a model may have
            ``callbacks``, a list of ``class_path`` and ``init_args``.
        output: CSV file, appended to.

    Raises:
        ValueError: If the grid doesn't say how often to test, or not so that the last epoch is tested.
    """
    grid = read_grid(config)
    if any(epochs_of(grid, data, model) % grid.get("every", math.inf) for data, model, _ in runs_of(grid)):
        msg = f"'{config}' needs `every`, the epochs from test to test, which divides the epochs of all models."
        raise ValueError(msg)
    done = {tuple(row[name] for name in KEY) for row in read_rows(output, COLUMNS)}
    for data, model, seed in runs_of(grid):
        facts = {"data": data, "model": model, "seed": seed}
        sizes = {name: grid[name] for name in ("image_size", "batch_size")}
        if tuple(map(str, (*facts.values(), epochs_of(grid, data, model), *sizes.values()))) in done:
            continue
        logger.warning("%s on %s, seed %d", model, data, seed)
        try:
            _fit(grid, data, model, seed, Curve(output, {**facts, **sizes, "commit": commit()}))
        except Exception:
            logger.exception("%s on %s, seed %d failed; the others go on", model, data, seed)


def _fit(grid: dict[str, Any], data: str, model: str, seed: int, curve: Curve) -> None:
    """Train one model, test it every few epochs."""
    seed_everything(seed, workers=True)
    datamodule = build_datamodule(grid, data)
    datamodule.val_data = datamodule.test_data
    module = build_model(grid, model, has_masks=datamodule.task == "segmentation")
    folder = curve.output.parent
    engine = Engine(
        max_epochs=epochs_of(grid, data, model),
        check_val_every_n_epoch=grid["every"],
        default_root_dir=folder / "curves",
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[
            curve,
            ModelCheckpoint(folder, save_top_k=0),
            *(instantiate_class((), callback) for callback in grid["models"][model].get("callbacks", ())),
        ],
        **trainer_options(grid, model),
    )
    engine.fit(module, datamodule=datamodule)


def curves_table(path: Path) -> str:
    """Make a Markdown table of each setting's end, and of when it came to where the first one ended.

    Args:
        path: CSV that ``run_curves`` wrote.

    Returns:
        Means over seeds in percent, up to the last epoch that all of them have; minutes are those of the CPU, without
        tests.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    lines = [
        "| data | model | seeds | epochs | minutes | image AUROC | AUPRO | minutes to the first's AUROC | its AUPRO |",
        "|" + "---|" * 9,
    ]
    for (data, _), rows in _read(path).groupby(["data", "image_size"], sort=False):
        ends: dict[str, float] = {}
        for (model, _), runs in rows.groupby(["model", "batch_size"], sort=False):
            common = runs.groupby("epoch")["seed"].transform("nunique") == runs["seed"].nunique()
            curve = runs[common].groupby("epoch")[["fit_minutes", *SHOWN]].mean()
            last = curve.iloc[-1]
            ends = ends or {name: last[name] for name in SHOWN}
            reached = [curve.loc[curve[name] >= end, "fit_minutes"].min() for name, end in ends.items()]
            cells = [f"{runs['seed'].nunique()}", f"{curve.index[-1]}", f"{last['fit_minutes']:.1f}"]
            cells += [f"{100 * last[name]:.1f}" for name in SHOWN]
            cells += ["-" if pd.isna(minutes) else f"{minutes:.1f}" for minutes in reached]
            lines.append(f"| {data} | {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_curves(path: Path, pictures: Path) -> list[Path]:
    """Draw image AUROC and AUPRO over the CPU minutes, a picture for each data set: mean of the seeds, thin lines each.

    Args:
        path: CSV that ``run_curves`` wrote. Models with fewer seeds than the first are left out, and so is the lowest
            tenth of the values, which the first epochs have.
        pictures: Folder.

    Returns:
        The files.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    pictures.mkdir(parents=True, exist_ok=True)
    files = []
    for data, rows in _read(path).groupby("data", sort=False):
        seeds = rows.groupby("model", sort=False)["seed"].nunique()
        shown = rows[rows["model"].isin(seeds.index[seeds >= seeds.iloc[0]])]
        figure, axes = plt.subplots(1, len(SHOWN), figsize=(12, 5), layout="constrained")
        for axis, metric in zip(axes, SHOWN, strict=True):
            for i, ((model, _), runs) in enumerate(shown.groupby(["model", "batch_size"], sort=False)):
                colour = plt.get_cmap("tab10")(i % 10)
                for _, run in runs.groupby("seed"):
                    axis.plot(run["fit_minutes"], 100 * run[metric], color=colour, alpha=0.3, linewidth=0.8)
                curve = runs.groupby("epoch")[["fit_minutes", metric]].mean()
                axis.plot(curve["fit_minutes"], 100 * curve[metric], ".-", color=colour, label=model)
            axis.set_ylim(bottom=100 * shown[metric].quantile(0.1) - 0.1)
            axis.set_xlabel("CPU minutes of training")
            axis.set_ylabel(f"{metric.replace('_', ' ')} in %")
            axis.grid(alpha=0.3)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
        figure.suptitle(f"{data}, {rows['image_size'].iloc[0]} px: mean of {seeds.iloc[0]} seeds (thin: each)")
        files.append(pictures / f"curves_{data.replace('/', '_')}.png")
        figure.savefig(files[-1], dpi=110)
        plt.close(figure)
    return files


def _read(path: Path) -> pd.DataFrame:
    """Rows of a CSV; of a fit that was begun twice, the later ones."""
    if not path.is_file():
        msg = f"No curves at '{path}': run `python -m anomalib_rdpp.benchmark curves CONFIG --output {path}` first."
        raise FileNotFoundError(msg)
    rows = pd.DataFrame(read_rows(path, COLUMNS), columns=COLUMNS).drop_duplicates(list(KEY), keep="last")
    numbers = ["epoch", "steps", "fit_minutes", *METRICS, "val_distance"]
    rows[numbers] = rows[numbers].apply(pd.to_numeric)
    return rows.sort_values("epoch", kind="stable")
