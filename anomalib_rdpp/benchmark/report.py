"""Tables of stored results: mean and standard deviation over seeds, times."""

from pathlib import Path

import pandas as pd

from .accuracy import PROTOCOLS, accuracy_results
from .build import METRICS
from .exports import PRECISIONS
from .latency import latency_results
from .results import markdown

SETTINGS = ["epochs", "batch_size"]  # runs that differ in these are not averaged
SAID = dict(zip(PROTOCOLS, ("last epoch, tested once", "**best epoch on the test images**"), strict=True))
TIMES = {"fit s": ("fit_seconds", ".0f"), "CPU min": ("fit_cpu_minutes", ".1f")}
FASTEST = "RD++"  # what the last column of the latency table compares with, in INT8
FACTS = {"first result ms": "first_result_ms", "memory MiB": "peak_mib", "file MiB": "file_mib"}


def run_report(csv: Path, latency: Path | None = None) -> str:
    """Print Markdown tables of stored results.

    Args:
        csv: CSV of accuracy.
        latency: CSV of latency.

    Returns:
        The tables.
    """
    tables = [accuracy_table(read_accuracy(csv))]
    return "\n\n".join(tables if latency is None else [*tables, latency_table(latency_results(latency).frame())])


def read_accuracy(path: Path) -> pd.DataFrame:
    """Read a CSV of ``accuracy``: of rows with the same key the last, metrics in percent."""
    rows = accuracy_results(path).frame()
    rows[list(METRICS)] *= 100
    return rows


def accuracy_table(rows: pd.DataFrame) -> str:
    """Make a table per protocol, data sets and models in their order; runs that failed are counted, not hidden."""
    tables = []
    for _, own in rows.groupby("protocol", sort=False):
        lines = []
        ordered = own.sort_values("data", key=lambda names: names.map(list(names.unique()).index), kind="stable")
        for (data, size, model, *_), runs in ordered.groupby(["data", "image_size", "model", *SETTINGS], sort=False):
            good = runs[runs["error"] == ""]
            failed = f" ({len(runs) - len(good)} failed)" if len(good) < len(runs) else ""
            line = {"data": data, "px": size + _seen(good), "model": model, "seeds": f"{len(good)}{failed}"}
            line |= {name: _written(good[name].median(), ".0f") for name in ("epochs", "steps")}
            line |= {name.replace("_", " "): mean_and_spread(good[name]) for name in METRICS if own[name].notna().any()}
            lines.append(line | {head: _written(good[name].median(), how) for head, (name, how) in TIMES.items()})
        tables.append(f"{caption(own)}\n\n{markdown(lines)}")
    return "\n\n".join(tables)


def latency_table(rows: pd.DataFrame) -> str:
    """Make a table per backbone and number of threads.

    Milliseconds as median (10th to 90th percentile); first result, memory and file of INT8; how many times the time of
    RD++ in INT8 each model takes at its best precision, without bfloat16 and, where that was measured, with it.
    """
    tables = []
    for (backbone, threads, size), own in rows.groupby(["backbone", "threads", "image_size"], sort=False):
        in_single, lines = own[~own["precision"].str.endswith("bf16")], []
        ways = [way for way in PRECISIONS if way in set(own["precision"])]
        bests = {f"x {FASTEST} int8": in_single} | ({"with bf16": own} if len(in_single) < len(own) else {})
        ours = own[(own["model"] == FASTEST) & (own["precision"] == "int8")]["median_ms"].min()
        for model, runs in own.set_index("precision").groupby("model", sort=False):
            good = runs[runs["error"] == ""]
            shown = next((good.loc[way] for way in ("int8", *reversed(ways)) if way in good.index), {})
            line = {"model": model + _seen(good), "GMAC": _written(shown.get("gmac"), ".1f")}
            line |= {way: _interval(runs.loc[way]) if way in runs.index else "-" for way in ways}
            line |= {head: _written(shown.get(name), ".0f") for head, name in FACTS.items()}
            for head, chosen in bests.items():
                line[head] = _written(chosen[chosen["model"] == model]["median_ms"].min() / ours, ".1f")
            lines.append(line)
        first, rounds = own.iloc[0], own["rounds"].min()
        said = f"`{backbone}`, {size} px, batch 1, {threads} threads: ms, median of {rounds:.0f} interleaved rounds"
        machine = f"{first.processor}, OpenVINO {first.openvino}."
        tables.append(f"{said} (10th to 90th percentile). {machine}\n\n{markdown(lines)}")
    return "\n\n".join(tables)


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
    return _written(values.mean(), mean) + (f" ± {values.std():{spread}}" if len(values) > 1 else "")


def short(milliseconds: float) -> str:
    """Write with a decimal below 20."""
    return f"{milliseconds:.{0 if milliseconds >= 20 else 1}f}"


def _interval(row: pd.Series) -> str:
    """Median and spread, or that there is none."""
    return "failed" if row.error else f"{short(row.median_ms)} ({short(row.p10_ms)}-{short(row.p90_ms)})"


def _seen(rows: pd.DataFrame) -> str:
    """Say what a network sees of its images, where that is another size."""
    others = rows["input_size"][~rows["input_size"].isin(["", *rows["image_size"]])]
    return f" (sees {others.iloc[0]} px)" if len(others) else ""


def _written(value: float | None, how: str) -> str:
    """Write a number, or that there is none."""
    return "-" if value is None or pd.isna(value) else f"{value:{how}}"
