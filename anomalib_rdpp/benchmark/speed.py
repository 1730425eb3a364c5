"""Tables and pictures from the CSV of the latency benchmark."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import LogLocator

from .accuracy import PROTOCOLS
from .latency import COLUMNS, KEY, PRECISIONS
from .report import SETTINGS, read_frame
from .rows import read_rows

NUMBERS = ("median_ms", "p10_ms", "p90_ms", "rounds", "first_result_ms", "peak_mib", "file_mib", "gmac")
FASTEST = "RD++"  # what the last column of the table compares with, in INT8


def latency_table(path: Path) -> str:
    """Make a Markdown table per backbone and number of threads.

    Args:
        path: CSV that ``run_latency`` wrote; of rows with the same key the last counts.

    Returns:
        Milliseconds as median (10th to 90th percentile); first result, memory and file of INT8; how many times the time
        of RD++ in INT8 each model takes at its best precision, without bfloat16 and, where that was measured, with it.
        What failed is said.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    tables = []
    for (backbone, threads, size), rows in _read(path).groupby(["backbone", "threads", "image_size"], sort=False):
        precisions = _precisions(rows)
        in_single = rows[~_is_bf16(rows)]
        bests = [in_single, rows] if len(in_single) < len(rows) else [rows]
        bests = [chosen.groupby("model")["median_ms"].min() for chosen in bests]
        ours = rows[(rows["model"] == FASTEST) & (rows["precision"] == "int8")]["median_ms"].dropna()
        rounds, first = rows["rounds"].min(), rows.iloc[0]
        facts = ["first result ms", "memory MiB", "file MiB"]
        ratios = [f"x {FASTEST} int8", "with bf16"][: len(bests)]
        heads = ["model", "GMAC", *precisions, *facts, *ratios]
        lines = [
            (
                f"`{backbone}`, {size} px, batch 1, {threads} threads: ms, median of {rounds:.0f} interleaved rounds "
                f"(10th to 90th percentile). {first.processor}, OpenVINO {first.openvino}."
            ),
            "",
            f"| {' | '.join(heads)} |",
            "|" + "---|" * len(heads),
        ]
        for model, runs in rows.groupby("model", sort=False):
            own = runs.set_index("precision")
            cells = [_interval(own.loc[p]) if p in own.index else "-" for p in precisions]
            good = own[own["error"] == ""]
            if good.empty:
                lines.append(f"| {' | '.join([model, '-', *cells, *len(facts + ratios) * '-'])} |")
                continue
            smallest = good.loc["int8" if "int8" in good.index else [p for p in precisions if p in good.index][-1]]
            times = [f"{best[model] / ours.iloc[0]:.1f}" if len(ours) and model in best else "-" for best in bests]
            found = [f"{smallest[name]:.0f}" for name in ("first_result_ms", "peak_mib", "file_mib")]
            lines.append(f"| {' | '.join([model, f'{smallest.gmac:.1f}', *cells, *found, *times])} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def draw_latency(path: Path, folder: Path, accuracy: Path | None = None) -> list[Path]:
    """Draw bars of latency, and, where there are results of the accuracy benchmark, accuracy over latency.

    Args:
        path: CSV that ``run_latency`` wrote.
        folder: Where the pictures go.
        accuracy: CSV that ``run_accuracy`` wrote with this backbone. A model's name there is the name here, or that up
            to the first comma; others are left out.

    Returns:
        The pictures; those of accuracy are one per data set that was tested at this image size.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    tested = [] if accuracy is None else _tested(accuracy)
    for (backbone, threads, size), rows in _measured(path).groupby(["backbone", "threads", "image_size"], sort=False):
        stem = f"{backbone}_{size}px_{threads}threads"
        pictures.append(
            _bars(rows, f"{backbone}, {size} px, batch 1, {threads} threads", folder / f"latency_{stem}.png")
        )
        for (data, tested_size), results in tested:
            picture = folder / f"accuracy_latency_{stem}_{data.replace('/', '_')}.png"
            if tested_size == size and _bubbles(rows, results, picture):
                pictures.append(picture)
    return pictures


def _read(path: Path) -> pd.DataFrame:
    """Read the rows, of those with the same key the last; older files don't say where a failed model was to run."""
    if not path.is_file():
        msg = f"No results at '{path}': run `python -m anomalib_rdpp.benchmark latency CONFIG --output {path}` first."
        raise FileNotFoundError(msg)
    rows = pd.DataFrame(read_rows(path, COLUMNS), columns=COLUMNS)
    rows = rows[rows["threads"] != ""].drop_duplicates(list(KEY), keep="last")
    rows[list(NUMBERS)] = rows[list(NUMBERS)].apply(pd.to_numeric)
    return rows


def _tested(accuracy: Path) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    """Read the rows of last epochs, by data set and image size."""
    rows = read_frame(accuracy)
    rows = rows[(rows["error"] == "") & (rows["protocol"] == PROTOCOLS[0])]
    return list(rows.groupby(["data", "image_size"], sort=False))


def _measured(path: Path) -> pd.DataFrame:
    """Read the rows of what didn't fail."""
    rows = _read(path)
    return rows[rows["error"] == ""]


def _precisions(rows: pd.DataFrame) -> list[str]:
    """Those of the rows, in our order."""
    return [precision for precision in PRECISIONS if precision in set(rows["precision"])]


def _is_bf16(rows: pd.DataFrame) -> pd.Series:
    """Which rows are of bfloat16, whose accuracy is a question of its own."""
    return rows["precision"].str.endswith("bf16")


def _interval(row: pd.Series) -> str:
    """Median and spread, or that there is none."""
    if row.error:
        return "failed"
    return f"{_short(row.median_ms)} ({_short(row.p10_ms)}-{_short(row.p90_ms)})"


def _short(milliseconds: float) -> str:
    """Write with a decimal below 20."""
    return f"{milliseconds:.{0 if milliseconds >= 20 else 1}f}"


def _bars(rows: pd.DataFrame, title: str, path: Path) -> Path:
    """Draw a group of bars per model, a bar per precision."""
    models = list(dict.fromkeys(rows["model"]))
    precisions = _precisions(rows)
    figure, axis = plt.subplots(figsize=(9, 1 + 0.75 * len(models)), layout="constrained")
    height = 0.8 / len(precisions)
    for i, precision in enumerate(precisions):
        own = rows[rows["precision"] == precision].set_index("model").reindex(models)
        places = [place + i * height for place in range(len(models))]
        spread = [own["median_ms"] - own["p10_ms"], own["p90_ms"] - own["median_ms"]]
        colour = plt.get_cmap("viridis")(0.85 * i / max(1, len(precisions) - 1))
        label = precision if precision == "torch" else f"OpenVINO {precision}"
        bars = axis.barh(places, own["median_ms"], height, xerr=spread, color=colour, label=label, ecolor="0.4")
        axis.bar_label(bars, fmt=_short, padding=4, fontsize=7)
    axis.set_yticks([place + 0.4 - height / 2 for place in range(len(models))], models)
    axis.invert_yaxis()
    axis.margins(x=0.08)
    axis.set_xlabel("milliseconds per image (median; lines: 10th to 90th percentile)")
    axis.set_title(title)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _bubbles(rows: pd.DataFrame, results: pd.DataFrame, path: Path) -> bool:
    """Draw image AUROC over the time of the best precision, unless no model has both; the area is the peak memory.

    Without bfloat16: the accuracy is that of single precision, which INT8 keeps within a stated loss.
    """
    rows = rows[~_is_bf16(rows)]
    # A mean of seeds; of epochs and batch sizes the last in the CSV.
    auroc = results.groupby(["model", *SETTINGS], sort=False)["image_AUROC"].mean().groupby("model").last()
    best = rows.loc[rows.groupby("model", sort=False)["median_ms"].idxmin()]
    names = best["model"].where(best["model"].isin(auroc.index), best["model"].str.split(", ").str[0])
    best = best.assign(auroc=names.map(auroc)).dropna(subset="auroc")
    if best.empty:
        return False
    figure, axis = plt.subplots(figsize=(7.5, 6), layout="constrained")
    for i, row in enumerate(best.itertuples()):
        label = f"{row.model}: {row.precision}, {_short(row.median_ms)} ms, {row.peak_mib:.0f} MiB"
        colour = plt.get_cmap("tab10")(i % 10)
        axis.scatter(row.median_ms, row.auroc, s=row.peak_mib, alpha=0.6, color=colour, label=label)
    axis.set_xscale("log", subs=[])
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.margins(0.2)
    for handle in figure.legend(loc="outside lower center", ncols=2, fontsize=8).legend_handles:
        handle.set_sizes([40])
    axis.set_xlabel("milliseconds per image, best precision")
    axis.set_ylabel("image AUROC in %, last epoch, mean of seeds")
    first = best.iloc[0]
    axis.set_title(
        f"{results['data'].iloc[0]}, {first.image_size} px\n"
        f"Times of {first.backbone}, {first.processor}, {first.threads} threads; area: peak memory",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
