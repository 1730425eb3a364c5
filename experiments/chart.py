"""Pictures of latency: bars per model and precision, and accuracy over the time of each model's best precision.

python -m experiments.chart results/latency.csv --accuracy experiments/results/long.csv experiments/results/rivals.csv
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import LogLocator

from anomalib_rdpp.benchmark.accuracy import PROTOCOLS
from anomalib_rdpp.benchmark.cli import run
from anomalib_rdpp.benchmark.exports import PRECISIONS
from anomalib_rdpp.benchmark.latency import latency_results
from anomalib_rdpp.benchmark.report import SETTINGS, read_accuracy, short

from .curves import KEY, SHOWN, curves_results


def draw_charts(latency: Path, accuracy: Sequence[Path] | None = None, pictures: Path = Path("results")) -> list[Path]:
    """Draw bars of latency, and accuracy over latency for data that were tested at the same image size.

    Args:
        latency: CSV of latency.
        accuracy: CSVs of accuracy or of experiments.curves (of each fit its last test), of the same backbone. A model's
            name there is the name here, or that without its bank; others are left out.
        pictures: Folder for pictures.

    Returns:
        The pictures.
    """
    times, drawn = latency_results(latency).frame(), []
    times, tested = times[times["error"] == ""], [_tested(path) for path in accuracy or ()]
    pictures.mkdir(parents=True, exist_ok=True)
    for (backbone, threads, size), own in times.groupby(["backbone", "threads", "image_size"], sort=False):
        stem = f"{backbone}_{size}px_{threads}threads"
        said = f"{backbone}, {size} px, batch 1, {threads} threads"
        drawn.append(_bars(own, said, pictures / f"latency_{stem}.png"))
        same_size = pd.concat(tested).query("image_size == @size") if tested else pd.DataFrame({"data": []})
        for data, results in same_size.groupby("data", sort=False):
            best = _best(own, results)
            if len(best):
                picture = pictures / f"accuracy_latency_{stem}_{data.replace('/', '_')}.png"
                drawn.append(_bubbles(best, data, picture))
    return drawn


def _tested(path: Path) -> pd.DataFrame:
    """Read what was tested at the end of trainings, metrics in percent."""
    if not path.is_file() or "fit_minutes" not in path.read_text(encoding="utf-8-sig").partition("\n")[0]:
        rows = read_accuracy(path)
        return rows[(rows["protocol"] == PROTOCOLS[0]) & (rows["error"] == "")]
    rows = curves_results(path).frame()
    rows = rows[rows["error"] == ""]
    fits = rows.groupby([name for name in KEY if name != "epoch"], sort=False)
    rows = rows.loc[fits["epoch"].idxmax()].assign(epochs=rows["epoch"])
    return rows.assign(**{metric: 100 * rows[metric] for metric in SHOWN})


def _bars(rows: pd.DataFrame, said: str, path: Path) -> Path:
    """Draw a group of bars per model, a bar per precision."""
    models, ways = list(dict.fromkeys(rows["model"])), [way for way in PRECISIONS if way in set(rows["precision"])]
    figure, axis = plt.subplots(figsize=(9, 1 + 0.75 * len(models)), layout="constrained")
    height = 0.8 / len(ways)
    for i, way in enumerate(ways):
        own = rows[rows["precision"] == way].set_index("model").reindex(models)
        places = [place + i * height for place in range(len(models))]
        spread = [own["median_ms"] - own["p10_ms"], own["p90_ms"] - own["median_ms"]]
        colour = plt.get_cmap("viridis")(0.85 * i / max(1, len(ways) - 1))
        label = way if way == "torch" else f"OpenVINO {way}"
        bars = axis.barh(places, own["median_ms"], height, xerr=spread, color=colour, label=label, ecolor="0.4")
        axis.bar_label(bars, fmt=short, padding=4, fontsize=7)
    axis.set_yticks([place + 0.4 - height / 2 for place in range(len(models))], models)
    axis.invert_yaxis()
    axis.margins(x=0.08)
    axis.set(title=said, xlabel="milliseconds per image (median; lines: 10th to 90th percentile)")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _best(rows: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """Give each model's best precision with its metrics, means of seeds; of epochs and batch sizes the last.

    Without bfloat16: the accuracy is that of single precision, which INT8 keeps within a stated loss. Of several banks
    the largest: accuracy is that of a model's default.
    """
    rows = rows[~rows["precision"].str.endswith("bf16")]
    metrics = results.groupby(["model", *SETTINGS], sort=False)[list(SHOWN)].mean().groupby("model").last()
    best = rows.loc[rows.groupby("model", sort=False)["median_ms"].idxmin()]
    names = best["model"].where(
        best["model"].isin(metrics.index), best["model"].str.replace(r", bank \d+$", "", regex=True)
    )
    best = best.loc[best.groupby(names, sort=False)["median_ms"].idxmax()]
    return best.assign(**{metric: names.map(metrics[metric]) for metric in SHOWN}).dropna(subset=SHOWN[0])


def _bubbles(best: pd.DataFrame, data: str, path: Path) -> Path:
    """Draw image AUROC and AUPRO over time; the area is the peak memory."""
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(11, 6), layout="constrained")
    for axis, metric in zip(axes, SHOWN, strict=True):
        axis.set_visible(best[metric].notna().any())  # without masks there is no AUPRO
        for i, row in enumerate(best.to_dict("records")):
            label = f"{row['model']}: {row['precision']}, {short(row['median_ms'])} ms, {row['peak_mib']:.0f} MiB"
            place = row["median_ms"], row[metric]
            axis.scatter(*place, s=row["peak_mib"], alpha=0.6, color=plt.get_cmap("tab20")(i % 20), label=label)
        axis.set_xscale("log", subs=[])
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.margins(0.2)
        axis.grid(alpha=0.3)
        axis.set(xlabel="milliseconds per image, best precision", ylabel=f"{metric.replace('_', ' ')} in %")
    legend = figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    for handle in legend.legend_handles:
        handle.set_sizes([40])
    first = best.iloc[0]
    machine = f"Times of {first.backbone}, {first.processor}, {first.threads} threads; area: peak memory"
    figure.suptitle(f"{data}, {first.image_size} px: last epoch, tested once, mean of seeds\n{machine}", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


if __name__ == "__main__":
    run("python -m experiments.chart", draw_charts)
