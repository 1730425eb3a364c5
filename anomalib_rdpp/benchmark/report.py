"""Tables from the CSV of the accuracy benchmark: mean and standard deviation over seeds, in percent."""

from pathlib import Path

import pandas as pd

from .accuracy import COLUMNS, KEY, METRICS, PROTOCOLS, read_results

SETTINGS = ("epochs", "batch_size")  # runs that differ in these are not averaged
SAID = dict(zip(PROTOCOLS, ("last epoch, tested once", "**best epoch on the test images**"), strict=True))


def accuracy_table(path: Path) -> str:
    """Make a Markdown table of each data set and model; runs that failed are counted, not hidden.

    Args:
        path: CSV that ``run_accuracy`` wrote.

    Returns:
        A table per protocol, data sets and models in the order of the CSV; the spread is the standard deviation over
        seeds.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    rows = read_frame(path)
    return "\n\n".join(_table(own) for _, own in rows.groupby("protocol", sort=False))


def _table(rows: pd.DataFrame) -> str:
    """Make the table of one protocol."""
    rows = rows.sort_values("data", key=lambda names: names.map(list(names.unique()).index), kind="stable")
    metrics = [metric for metric in METRICS if rows[metric].notna().any()]
    lines = [
        caption(rows),
        "",
        "| data | px | model | seeds | epochs | steps | "
        + " | ".join(name.replace("_", " ") for name in metrics)
        + " | fit s |",
        "|" + "---|" * (len(metrics) + 7),
    ]
    for (data, size, model, _, _), runs in rows.groupby(["data", "image_size", "model", *SETTINGS], sort=False):
        good = runs[runs["error"] == ""]
        failed = f" ({len(runs) - len(good)} failed)" if len(good) < len(runs) else ""
        cells = [mean_and_spread(good[metric]) for metric in metrics]
        lengths = ["-" if good.empty else f"{good[name].median():.0f}" for name in ("epochs", "steps", "fit_seconds")]
        lines.append(
            "| " + " | ".join([data, size, model, f"{len(good)}{failed}", *lengths[:2], *cells, lengths[2]]) + " |"
        )
    return "\n".join(lines)


def read_frame(path: Path) -> pd.DataFrame:
    """Read an accuracy CSV: of rows with the same key the last, metrics in percent.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        msg = f"No results at '{path}': run `python -m anomalib_rdpp.benchmark accuracy CONFIG --output {path}` first."
        raise FileNotFoundError(msg)
    rows = pd.DataFrame(read_results(path), columns=COLUMNS).drop_duplicates(list(KEY), keep="last")  # retried ones
    numbers = [*METRICS, "epochs", "steps", "fit_seconds"]
    rows[numbers] = rows[numbers].apply(pd.to_numeric)
    rows[list(METRICS)] *= 100
    return rows


def caption(rows: pd.DataFrame) -> str:
    """Say how the rows of one protocol were chosen, and by which teacher."""
    teachers = rows.groupby("teacher", sort=False)["model"].unique()
    said = [
        (teacher or "not recorded") + (f" ({', '.join(models)})" if len(teachers) > 1 else "")
        for teacher, models in teachers.items()
    ]
    return f"Percent; {SAID[rows['protocol'].iloc[0]]}. Teacher: {'; '.join(said)}."


def mean_and_spread(values: pd.Series, mean: str = ".1f", spread: str = ".1f") -> str:
    """Mean, and standard deviation where there is more than one value."""
    values = values.dropna()
    if values.empty:
        return "-"
    return f"{values.mean():{mean}}" + (f" ± {values.std():{spread}}" if len(values) > 1 else "")
