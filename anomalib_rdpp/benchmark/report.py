"""Tables from the CSV of the accuracy benchmark: mean and standard deviation over seeds, in percent."""

from pathlib import Path

import pandas as pd

from .accuracy import METRICS


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
    rows = pd.read_csv(path)
    metrics = [metric for metric in METRICS if rows[metric].notna().any()]
    lines = [
        "| data | model | seeds | epochs | steps | "
        + " | ".join(name.replace("_", " ") for name in metrics)
        + " | fit s |",
        "|" + "---|" * (len(metrics) + 6),
    ]
    for (data, model), runs in rows.groupby(["data", "model"], sort=False):
        good = runs[runs["error"].isna()]
        failed = f" ({len(runs) - len(good)} failed)" if len(good) < len(runs) else ""
        cells = [f"{100 * good[metric].mean():.1f} ± {100 * good[metric].std():.1f}" for metric in metrics]
        numbers = [f"{good[name].median():.0f}" for name in ("epochs", "steps")]
        lines.append(
            f"| {data} | {model} | {len(good)}{failed} | "
            + " | ".join([*numbers, *cells])
            + f" | {good['fit_seconds'].median():.0f} |"
        )
    return "\n".join(lines)
