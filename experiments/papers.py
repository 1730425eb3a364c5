"""Many data sets: models side by side with mean and rank, as table and bars, and published figures beside ours.

python -m experiments.papers results/mvtecad.csv --published configs/benchmark/papers/mvtecad.yaml
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from anomalib_rdpp.benchmark.build import METRICS
from anomalib_rdpp.benchmark.cli import run
from anomalib_rdpp.benchmark.grid import epochs_of, read_grid, row_names
from anomalib_rdpp.benchmark.report import caption, mean_and_spread, read_accuracy
from anomalib_rdpp.benchmark.results import markdown

EQUAL = ["protocol", "image_size", "batch_size"]  # of runs that may stand side by side


def compare(csv: Path, published: Sequence[Path] = (), pictures: Path | None = None) -> list[str | Path]:
    """Print models side by side with mean and rank, and published figures beside ours.

    Args:
        csv: CSV of accuracy.
        published: YAML grids with published figures.
        pictures: Folder for pictures.

    Returns:
        The tables, and the pictures that were drawn.
    """
    rows = read_accuracy(csv)
    rows = rows[rows["error"] == ""].astype({"epochs": int})
    texts = [ranking_tables(rows), *(published_table(rows, grid) for grid in published)]
    return ["\n\n".join(filter(None, texts)), *([] if pictures is None else draw_accuracy(rows, pictures))]


def ranking_tables(rows: pd.DataFrame) -> str:
    """Make a table per metric, models side by side, where there are several models and data sets.

    The best is in bold; mean and mean rank are over the data sets that every model has been tested on.
    """
    tables = []
    for own in _comparable(rows):
        for metric in METRICS:
            means = _pivot(own, metric)
            if min(means.shape) < 2:
                continue
            best = means.round(1).eq(means.max(axis=1).round(1), axis=0)  # as far as it is printed
            cells = own.pivot_table(metric, "data", "model", mean_and_spread, sort=False).reindex_like(means)
            cells = cells.where(means.notna(), "-").mask(best, "**" + cells.astype(str) + "**")
            common = means.dropna()
            if len(common):
                cells.loc[f"mean of {len(common)}"] = common.mean().map("{:.1f}".format)
                cells.loc["mean rank"] = common.rank(axis=1, ascending=False).mean().map("{:.1f}".format)
            table = markdown(cells.rename_axis("data").reset_index().to_dict("records"))
            tables.append(f"{metric.replace('_', ' ')}, {_settings(own)}. {caption(own)}\n\n{table}")
    return "\n\n".join(tables)


def draw_accuracy(rows: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw bars per data set and model, a row per metric; lines are the standard deviation over seeds."""
    pictures = []
    for own in _comparable(rows):
        metrics = [metric for metric in METRICS[:3] if own[metric].notna().any()]
        if not metrics:
            continue
        size = max(6, 2 + 0.22 * own.groupby(["data", "model"]).ngroups), 2.6 * len(metrics)
        figure, axes = plt.subplots(len(metrics), figsize=size, squeeze=False, layout="constrained")
        for axis, metric in zip(axes.flat, metrics, strict=True):
            means = _pivot(own, metric)
            spread = _pivot(own, metric, "std").reindex_like(means).fillna(0)
            means.plot.bar(ax=axis, yerr=spread, width=0.8, rot=20 if len(means) > 3 else 0, legend=axis is axes[0, 0])
            axis.set(ylim=(max(0, means.min().min() - 5), 100), xlabel="")
            axis.set_ylabel(f"{metric.replace('_', ' ')}, %\n(axis cut)", fontsize=8)
        axes[0, 0].legend(fontsize=8, ncols=min(4, len(means.columns)), loc="lower center", bbox_to_anchor=(0.5, 1))
        figure.suptitle(f"{_settings(own)}. {caption(own).replace('**', '')}", fontsize=8, wrap=True)
        stem = "_".join([*own[["image_size", "batch_size"]].iloc[0], own["protocol"].iloc[0].replace(" ", "_")])
        pictures.append(folder / f"accuracy_{stem}.png")
        figure.savefig(pictures[-1], dpi=90)
        plt.close(figure)
    return pictures


def published_table(rows: pd.DataFrame, config: Path) -> str:
    """Make a Markdown table of our figures, the published ones and the differences.

    Args:
        rows: Of a CSV of ``accuracy``.
        config: Grid with ``published``, a list of ``data``, ``model``, ``source`` and metrics in percent; with ``over``
            the figures are differences to that model. Data with categories are their mean.

    Returns:
        One line per published row and protocol of ours. A mean of part of the categories says so and has no difference.

    Raises:
        ValueError: If the grid has no published figures, or for data or models that it has not.
    """
    grid = read_grid(config)
    if not grid.get("published"):
        msg = f"'{config}' has no published figures: add `published`, a list of data, model, source and metrics."
        raise ValueError(msg)
    for setting in ("image_size", "batch_size"):
        rows = rows[rows[setting] == str(grid[setting])]
    planned = {
        (name, model, epochs_of(grid, data, model))
        for data in grid["data"]
        for name in row_names(grid, data)
        for model in grid["models"]
    }
    rows = rows.loc[[key in planned for key in zip(rows["data"], rows["model"], rows["epochs"], strict=True)]]
    lines = []
    for entry in grid["published"]:
        names = _names(grid, entry["data"])
        known = [entry[key] for key in ("model", "over") if key in entry]
        if not names or not set(known) <= set(grid["models"]):
            msg = f"'{config}' has published figures of {' and '.join(known)} on {entry['data']}, but no such runs."
            raise ValueError(msg)
        own = rows[rows["data"].isin(names)]
        line = {"data": entry["data"], "model": " - ".join(known), "source": entry["source"]}
        for protocol in own["protocol"].unique() if len(own) else ("not run",):
            chosen = own[own["protocol"] == protocol]
            cells = {metric.replace("_", " "): _beside(chosen, metric, entry, len(names)) for metric in METRICS[:3]}
            lines.append({**line, "ours": protocol, **cells})
    return (
        f"Ours, published (difference) in percent. {grid['image_size']} px, batch {grid['batch_size']}. Teacher: "
        f"{grid.get('teacher', 'not recorded')}.\n\n{markdown(lines)}"
    )


def _names(grid: dict[str, Any], data: str) -> list[str]:
    """Name the rows' data that a published figure is the mean of."""
    names = [name for own in grid["data"] for name in row_names(grid, own)]
    return [name for name in names if name == data or name.startswith(f"{data}/")]


def _beside(rows: pd.DataFrame, metric: str, entry: dict[str, Any], count: int) -> str:
    """Put our mean of data sets, the published one and the difference into a cell."""
    theirs = entry.get(metric)
    over, sign = entry.get("over"), "+" if "over" in entry else ""
    by_data = {model: rows[rows["model"] == model].groupby("data")[metric].mean() for model in (entry["model"], over)}
    ours = (by_data[entry["model"]] - by_data[over] if over else by_data[entry["model"]]).dropna()
    said = "-" if ours.empty else f"{ours.mean():{sign}.1f}"
    if 0 < len(ours) < count:
        said += f" of {len(ours)} of {count}"
    if theirs is None:
        return said
    difference = f" ({ours.mean() - theirs:+.1f})" if len(ours) == count else ""
    return f"{said}, {theirs:{sign}}{difference}"


def _comparable(rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Give the rows that may stand side by side; a model of several lengths on one data set is several."""
    rows = rows.copy()
    lengths = rows.groupby([*EQUAL, "data", "model"])["epochs"].transform("nunique")
    several = rows["model"].isin(rows["model"][lengths > 1])
    rows.loc[several, "model"] += ", " + rows["epochs"].astype(str) + " epochs"
    yield from (own for _, own in rows.groupby(EQUAL, sort=False))


def _pivot(rows: pd.DataFrame, metric: str, of_seeds: str = "mean") -> pd.DataFrame:
    """Data by model in the order of the rows, without data or models that have no such metric."""
    table = rows.pivot_table(metric, "data", "model", of_seeds, sort=False)
    return table.dropna(how="all").dropna(axis=1, how="all")


def _settings(rows: pd.DataFrame) -> str:
    """Say what is equal for all."""
    return f"{rows.iloc[0].image_size} px, batch {rows.iloc[0].batch_size}"


if __name__ == "__main__":
    run("python -m experiments.papers", compare)
