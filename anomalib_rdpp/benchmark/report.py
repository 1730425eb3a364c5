"""Tables from the CSV of the accuracy benchmark: mean and standard deviation over seeds, in percent."""

from pathlib import Path

import pandas as pd

from .accuracy import COLUMNS, KEY, METRICS
from .rows import read_rows

SETTINGS = ("epochs", "batch_size")  # runs that differ in these are not averaged


def accuracy_table(path: Path) -> str:
    """Make a Markdown table of each data set and model; runs that failed are counted, not hidden.

    Args:
        path: CSV that ``run_accuracy`` wrote.

    Returns:
        Data sets and models in the order of the CSV; the spread is the standard deviation over seeds.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        msg = f"No results at '{path}': run `python -m anomalib_rdpp.benchmark accuracy CONFIG --output {path}` first."
        raise FileNotFoundError(msg)
    rows = pd.DataFrame(read_rows(path, COLUMNS), columns=COLUMNS).drop_duplicates(
        list(KEY), keep="last"
    )  # retried ones
    rows = rows.sort_values("data", key=lambda names: names.map(list(names.unique()).index), kind="stable")
    numbers = [*METRICS, "epochs", "steps", "fit_seconds"]
    rows[numbers] = rows[numbers].apply(pd.to_numeric)
    metrics = [metric for metric in METRICS if rows[metric].notna().any()]
    lines = [
        "| data | px | model | seeds | epochs | steps | "
        + " | ".join(name.replace("_", " ") for name in metrics)
        + " | fit s |",
        "|" + "---|" * (len(metrics) + 7),
    ]
    for (data, size, model, _, _), runs in rows.groupby(["data", "image_size", "model", *SETTINGS], sort=False):
        good = runs[runs["error"] == ""]
        failed = f" ({len(runs) - len(good)} failed)" if len(good) < len(runs) else ""
        cells = [_mean_and_spread(100 * good[metric]) for metric in metrics]
        lengths = ["-" if good.empty else f"{good[name].median():.0f}" for name in ("epochs", "steps", "fit_seconds")]
        lines.append(
            "| " + " | ".join([data, size, model, f"{len(good)}{failed}", *lengths[:2], *cells, lengths[2]]) + " |"
        )
    return "\n".join(lines)


def _mean_and_spread(values: pd.Series) -> str:
    """Mean, and standard deviation where there is more than one value."""
    if values.empty:
        return "-"
    return f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")
