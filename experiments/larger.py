"""What larger inputs cost and give: time and time per pixel, image AUROC and AUPRO over the side of the input.

python -m experiments.larger experiments/results/latency_larger.csv experiments/results/larger.csv
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from anomalib_rdpp.benchmark.cli import run
from anomalib_rdpp.benchmark.latency import latency_results
from anomalib_rdpp.benchmark.report import accuracy_table, read_accuracy, short
from anomalib_rdpp.benchmark.results import markdown

from .curves import SHOWN


def draw_larger(latency: Path, accuracy: Path, picture: Path = Path("docs/images/larger.png")) -> list[str]:
    """Draw and print times and accuracy by the side of the input.

    Args:
        latency: CSV of latency whose models end with their side, ``RD++, 384 px``, at one precision and thread count.
        accuracy: CSV of accuracy with runs at several sizes.
        picture: File for the picture.

    Returns:
        Tables of times and of accuracy, and the picture's path.
    """
    times, tests = latency_results(latency).frame(), read_accuracy(accuracy)
    times, tests = (rows[rows["error"] == ""] for rows in (times, tests))
    times = times.assign(family=times["model"].str.rsplit(", ", n=1).str[0], side=times["input_size"].astype(int))
    tests = tests.assign(side=tests["image_size"].astype(int))
    data = list(tests["data"].unique())
    figure, axes = plt.subplots(1, 1 + len(data), figsize=(5 * (1 + len(data)), 4.6), layout="constrained")
    lines = []
    for family, own in times.groupby("family", sort=False):
        curve = own.set_index("side")["median_ms"].sort_index()
        per_pixel = curve / pd.Series(curve.index, curve.index) ** 2
        growth = per_pixel / per_pixel.iloc[0]
        axes[0].plot(curve.index, curve, ".-", label=family)
        line = {"model": family} | {f"{side} px": f"{short(ms)} ms" for side, ms in curve.items()}
        lines.append(line | {f"per pixel, {side} px": f"{value:.2f}" for side, value in growth.items()})
    axes[0].set(title="INT8 milliseconds per image", yscale="log", xlabel="side of the input in pixels")
    for axis, name in zip(axes[1:], data, strict=True):
        for i, (model, own) in enumerate(tests[tests["data"] == name].groupby("model", sort=False)):
            for metric, style in zip(SHOWN, (".-", ".--"), strict=True):
                mean = own.groupby("side")[metric].mean()
                axis.plot(mean.index, mean, style, color=f"C{i}", label=f"{model}: {metric.replace('_', ' ')}")
        axis.set(title=f"{name}, %", xlabel="side of the input in pixels")
    for axis in axes:
        axis.set_xticks(sorted(times["side"].unique()))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=90)
    plt.close(figure)
    return [markdown(lines), "", accuracy_table(tests), "", str(picture)]


if __name__ == "__main__":
    run("python -m experiments.larger", draw_larger)
