"""Run benchmarks: ``python -m anomalib_rdpp.benchmark accuracy|curves|latency|precision|steps|report|gallery ...``."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from .accuracy import run_accuracy
from .curves import curves_table, draw_curves, run_curves
from .gallery import draw_anomalies, draw_gallery
from .latency import run_latency
from .precision import PRECISIONS, precision_table, run_precision
from .report import accuracy_table
from .speed import draw_latency, latency_table
from .steps import run_steps


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "accuracy":
            index, _, count = chosen.shard.partition("/")
            if not (index.isdigit() and count.isdigit()):
                parser.error(f"--shard takes i/n, 2/8 for instance, got '{chosen.shard}'")
            for config in chosen.configs:
                run_accuracy(config, chosen.output, (int(index), int(count)))
        elif chosen.command == "curves":
            run_curves(chosen.config, chosen.output)
            sys.stdout.write(f"{curves_table(chosen.output)}\n")
            _list(draw_curves(chosen.output, chosen.pictures))
        elif chosen.command == "latency":
            run_latency(chosen.config, chosen.output, chosen.minutes)
        elif chosen.command == "precision":
            which = chosen.data, chosen.models, chosen.precisions
            run_precision(chosen.config, chosen.results, chosen.output, chosen.seed, *which)
            sys.stdout.write(f"{precision_table(chosen.output)}\n")
        elif chosen.command == "steps":
            table = run_steps(chosen.output, chosen.backbone, chosen.size, chosen.batch, chosen.rounds)
            sys.stdout.write(f"{table}\n")
        elif chosen.command == "gallery":
            draw = (
                [draw_anomalies(config, chosen.output) for config in chosen.configs]
                if chosen.anomalies
                else [draw_gallery(chosen.configs, chosen.results, chosen.output, chosen.seed)]
            )
            _list(chain(*draw))
        else:
            _report(chosen.csv, chosen.latency, chosen.pictures, chosen.bubbles)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    """Describe the commands."""
    parser = argparse.ArgumentParser(prog="python -m anomalib_rdpp.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    accuracy = commands.add_parser("accuracy", help="train and test models x data x seeds, one CSV row each")
    accuracy.add_argument("configs", nargs="+", type=Path, help="YAML grids")
    accuracy.add_argument("--output", type=Path, default=Path("results/accuracy.csv"), help="CSV; rows in it are kept")
    accuracy.add_argument("--shard", default="1/1", help="i/n: run every n-th row, from the i-th")

    curves = commands.add_parser("curves", help="test models every few epochs: accuracy over minutes of training")
    curves.add_argument("config", type=Path, help="YAML grid")
    curves.add_argument("--output", type=Path, default=Path("results/curves.csv"), help="CSV; rows in it are kept")
    curves.add_argument("--pictures", type=Path, default=Path("results"), help="folder for pictures")

    latency = commands.add_parser("latency", help="time models x precisions x threads at batch 1, interleaved")
    latency.add_argument("config", type=Path, help="YAML grid")
    latency.add_argument("--output", type=Path, default=Path("results/latency.csv"), help="CSV; rows are appended")
    latency.add_argument("--minutes", type=float, default=30, help="bound on the rounds of all")

    precision = commands.add_parser("precision", help="test an accuracy grid's models in torch, OpenVINO and INT8")
    precision.add_argument("config", type=Path, help="YAML grid that was run")
    precision.add_argument("--results", type=Path, default=Path("results"), help="folder of its CSV and checkpoints")
    precision.add_argument("--output", type=Path, default=Path("results/precision.csv"), help="CSV; rows are kept")
    precision.add_argument("--seed", type=int, default=0, help="of the runs to test")
    precision.add_argument("--data", nargs="+", help="names of the grid's data, all by default")
    precision.add_argument("--models", nargs="+", help="names of the grid's models, all by default")
    precision.add_argument("--precisions", nargs="+", default=PRECISIONS, help=f"of {', '.join(PRECISIONS)}")

    steps = commands.add_parser("steps", help="time a training step's parts, beside the published program's way")
    steps.add_argument("--output", type=Path, default=Path("results/steps.csv"), help="CSV; rows are appended")
    steps.add_argument("--backbone", default="resnet18", help="teacher, with random weights")
    steps.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    steps.add_argument("--batch", type=int, default=16, help="images per step")
    steps.add_argument("--rounds", type=int, default=7, help="steps of each way")

    report = commands.add_parser("report", help="print Markdown tables of such CSVs, draw pictures")
    report.add_argument("csv", type=Path, help="accuracy CSV")
    report.add_argument("--latency", type=Path, help="latency CSV")
    report.add_argument("--pictures", type=Path, help="folder for pictures of the latency CSV")
    report.add_argument("--bubbles", action="store_true", help="also draw accuracy over latency, of equal backbones")

    gallery = commands.add_parser("gallery", help="draw heat maps of an accuracy grid's models side by side")
    gallery.add_argument("configs", nargs="+", type=Path, help="YAML grids that were run")
    gallery.add_argument("--results", type=Path, default=Path("results"), help="folder of its CSV and checkpoints")
    gallery.add_argument("--output", type=Path, default=Path("results/gallery"), help="folder for pictures")
    gallery.add_argument("--anomalies", action="store_true", help="draw AAND's synthetic anomalies instead")
    gallery.add_argument("--seed", type=int, default=0, help="of the runs to draw")
    return parser


def _report(accuracy: Path, latency: Path | None, pictures: Path | None, bubbles: bool) -> None:
    """Print tables, draw pictures."""
    sys.stdout.write(f"{accuracy_table(accuracy)}\n")
    if latency is not None:
        sys.stdout.write(f"\n{latency_table(latency)}\n")
        if pictures is not None:
            _list(draw_latency(latency, pictures, accuracy if bubbles else None))


def _list(paths: Iterable[Path]) -> None:
    """Name the files that were written."""
    for path in paths:
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
