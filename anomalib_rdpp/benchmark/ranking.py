"""Models side by side: tables per metric with mean and rank, bars, and the published figures beside ours."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from .accuracy import METRICS
from .grid import epochs_of, read_grid, row_names
from .report import caption, mean_and_spread, read_frame


def ranking_tables(path: Path) -> str:
    """Make a Markdown table per metric, models side by side, where there are several models and data sets.

    Args:
        path: CSV that ``run_accuracy`` wrote.

    Returns:
        Mean and standard deviation over seeds, the best in bold; mean and mean rank are over the data sets that every
        model has been tested on. Empty if there is nothing to rank.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    tables = []
    for rows in _comparable(path):
        for metric in METRICS:
            means = _pivot(rows, metric)
            if min(means.shape) < 2:
                continue
            lines = [
                f"{metric.replace('_', ' ')}, {_settings(rows)}. {caption(rows)}",
                "",
                f"| data | {' | '.join(means)} |",
                "|" + "---|" * (len(means.columns) + 1),
            ]
            for data, values in means.iterrows():
                runs = rows[rows["data"] == data].groupby("model")[metric]
                cells = [
                    "-" if pd.isna(value) else mean_and_spread(runs.get_group(model)) for model, value in values.items()
                ]
                is_best = values.round(1) == values.max().round(1)  # as far as it is printed
                cells = [f"**{cell}**" if best else cell for cell, best in zip(cells, is_best, strict=True)]
                lines.append(f"| {' | '.join([data, *cells])} |")
            common = means.dropna()
            if len(common):
                ranks = common.rank(axis=1, ascending=False).mean()
                lines.append(f"| mean of {len(common)} | {' | '.join(f'{mean:.1f}' for mean in common.mean())} |")
                lines.append(f"| mean rank | {' | '.join(f'{rank:.1f}' for rank in ranks)} |")
            tables.append("\n".join(lines))
    return "\n\n".join(tables)


def published_table(path: Path, config: Path) -> str:
    """Make a Markdown table of our figures, the published ones and the differences.

    Args:
        path: CSV that ``run_accuracy`` wrote.
        config: Grid with ``published``, a list of ``data``, ``model``, ``source`` and metrics in percent; with ``over``
            the figures are differences to that model. Data with categories are their mean.

    Returns:
        One line per published row and protocol of ours. A mean of part of the categories says so and has no difference.

    Raises:
        FileNotFoundError: If there is no such CSV.
        ValueError: If the grid has no published figures, or for data or models that it has not.
    """
    grid = read_grid(config)
    if not grid.get("published"):
        msg = f"'{config}' has no published figures: add `published`, a list of data, model, source and metrics."
        raise ValueError(msg)
    rows = _tested(path)
    planned = {
        (name, model, epochs_of(grid, data, model))
        for data in grid["data"]
        for name in row_names(grid, data)
        for model in grid["models"]
    }
    for setting in ("image_size", "batch_size"):
        rows = rows[rows[setting] == str(grid[setting])]
    rows = rows.loc[[key in planned for key in zip(rows["data"], rows["model"], rows["epochs"], strict=True)]]
    lines = [
        (
            f"Ours, published (difference) in percent. {grid['image_size']} px, batch {grid['batch_size']}. Teacher: "
            f"{grid.get('teacher', 'not recorded')}."
        ),
        "",
        f"| data | model | source | ours | {' | '.join(name.replace('_', ' ') for name in METRICS[:3])} |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in grid["published"]:
        names = _names(grid, entry["data"])
        known = [entry[key] for key in ("model", "over") if key in entry]
        if not names or not set(known) <= set(grid["models"]):
            msg = f"'{config}' has published figures of {' and '.join(known)} on {entry['data']}, but no such runs."
            raise ValueError(msg)
        own = rows[rows["data"].isin(names)]
        label = entry["model"] + (f" - {entry['over']}" if "over" in entry else "")
        for protocol in own["protocol"].unique() if len(own) else ("not run",):
            cells = [_beside(own[own["protocol"] == protocol], metric, entry, len(names)) for metric in METRICS[:3]]
            lines.append(f"| {' | '.join([entry['data'], label, entry['source'], protocol, *cells])} |")
    return "\n".join(lines)


def draw_accuracy(path: Path, folder: Path) -> list[Path]:
    """Draw bars per data set and model, a row per metric; lines are the standard deviation over seeds.

    Args:
        path: CSV that ``run_accuracy`` wrote.
        folder: Where the pictures go, one per protocol, image size and batch size.

    Returns:
        The pictures.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for rows in _comparable(path):
        metrics = [metric for metric in METRICS[:3] if rows[metric].notna().any()]
        size = 2 + 0.22 * rows.groupby(["data", "model"]).ngroups
        figure, axes = plt.subplots(
            len(metrics), figsize=(max(6, size), 2.6 * len(metrics)), squeeze=False, layout="constrained"
        )
        for axis, metric in zip(axes.flat, metrics, strict=True):
            means = _pivot(rows, metric)
            spread = _pivot(rows, metric, "std").reindex_like(means).fillna(0)
            means.plot.bar(ax=axis, yerr=spread, width=0.8, rot=20 if len(means) > 3 else 0, legend=axis is axes[0, 0])
            axis.set_ylim(max(0, means.min().min() - 5), 100)
            axis.set_xlabel("")
            axis.set_ylabel(f"{metric.replace('_', ' ')}, %\n(axis cut)", fontsize=8)
        axes[0, 0].legend(fontsize=8, ncols=min(4, len(means.columns)), loc="lower center", bbox_to_anchor=(0.5, 1))
        figure.suptitle(f"{_settings(rows)}. {caption(rows).replace('**', '')}", fontsize=8, wrap=True)
        stem = "_".join([*rows[["image_size", "batch_size"]].iloc[0], rows["protocol"].iloc[0].replace(" ", "_")])
        pictures.append(folder / f"accuracy_{stem}.png")
        figure.savefig(pictures[-1], dpi=90)
        plt.close(figure)
    return pictures


def _tested(path: Path) -> pd.DataFrame:
    """Read the rows that didn't fail."""
    rows = read_frame(path)
    return rows[rows["error"] == ""].astype({"epochs": int})


def _comparable(path: Path) -> Iterator[pd.DataFrame]:
    """Give the rows that may stand side by side; a model of several lengths on one data set is several."""
    rows = _tested(path)
    equal = ["protocol", "image_size", "batch_size"]
    lengths = rows.groupby([*equal, "data", "model"])["epochs"].transform("nunique")
    several = rows["model"].isin(rows["model"][lengths > 1])
    rows.loc[several, "model"] += ", " + rows["epochs"].astype(str) + " epochs"
    yield from (own for _, own in rows.groupby(equal, sort=False))


def _pivot(rows: pd.DataFrame, metric: str, of_seeds: str = "mean") -> pd.DataFrame:
    """Data by model in the order of the rows, without data or models that have no such metric."""
    table = rows.pivot_table(metric, "data", "model", of_seeds, sort=False)
    return table.dropna(how="all").dropna(axis=1, how="all")


def _settings(rows: pd.DataFrame) -> str:
    """Say what is equal for all."""
    first = rows.iloc[0]
    return f"{first.image_size} px, batch {first.batch_size}"


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
