"""Run benchmarks: ``python -m anomalib_rdpp.benchmark COMMAND ...``; docs/benchmark.md leads through them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .accuracy import run_accuracy
from .analyses import analyses_table, run_analyses
from .curves import curves_table, draw_curves, run_curves
from .gallery import draw_anomalies, draw_gallery
from .latency import PRECISIONS as TIMED
from .latency import run_latency
from .layers import layer_table
from .precision import PRECISIONS, precision_table, run_precision
from .ranking import draw_accuracy, published_table, ranking_tables
from .report import accuracy_table
from .speed import draw_latency, latency_table
from .steps import run_steps


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        for line in chosen.run(chosen):
            sys.stdout.write(f"{line}\n")
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    """Describe the commands."""
    parser = argparse.ArgumentParser(prog="python -m anomalib_rdpp.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_runs(commands)
    _add_times(commands)
    _add_pictures(commands)
    return parser


def _add_runs(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Describe what trains or tests models."""
    accuracy = commands.add_parser("accuracy", help="train and test models x data x seeds, one CSV row each")
    accuracy.add_argument("configs", nargs="+", type=Path, help="YAML grids")
    accuracy.add_argument("--output", type=Path, default=Path("results/accuracy.csv"), help="CSV; rows in it are kept")
    accuracy.add_argument("--shard", default="1/1", help="i/n: run every n-th run, from the i-th")
    accuracy.add_argument(
        "--best-on-test",
        action="store_true",
        help="report the best epoch on the TEST images, as the published programs do; rows and tables say so",
    )
    accuracy.set_defaults(run=_run_accuracy)

    curves = commands.add_parser("curves", help="test models every few epochs: accuracy over minutes of training")
    curves.add_argument("config", type=Path, help="YAML grid")
    curves.add_argument("--output", type=Path, default=Path("results/curves.csv"), help="CSV; rows in it are kept")
    curves.add_argument("--pictures", type=Path, default=Path("results"), help="folder for pictures")
    curves.set_defaults(run=_run_curves)

    analyses = commands.add_parser("analyses", help="analyse what a grid's models do to features, scores, maps")
    analyses.add_argument("configs", nargs="+", type=Path, help="YAML grids that were run")
    analyses.add_argument("--results", type=Path, default=Path("results"), help="folder of its CSV and checkpoints")
    analyses.add_argument("--output", type=Path, default=Path("results/analyses.csv"), help="CSV, pictures beside it")
    analyses.add_argument("--seed", type=int, default=0, help="of the runs to analyse")
    analyses.add_argument("--data", nargs="+", help="names of the grids' data, all by default")
    analyses.add_argument("--models", nargs="+", help="names of the grids' models, all by default")
    analyses.set_defaults(run=_run_analyses)

    precision = commands.add_parser("precision", help="test an accuracy grid's models in torch, OpenVINO and INT8")
    precision.add_argument("config", type=Path, help="YAML grid that was run")
    precision.add_argument("--results", type=Path, default=Path("results"), help="folder of its CSV and checkpoints")
    precision.add_argument("--output", type=Path, default=Path("results/precision.csv"), help="CSV; rows are kept")
    precision.add_argument("--seed", type=int, default=0, help="of the runs to test")
    precision.add_argument("--data", nargs="+", help="names of the grid's data, all by default")
    precision.add_argument("--models", nargs="+", help="names of the grid's models, all by default")
    precision.add_argument("--precisions", nargs="+", default=PRECISIONS, help=f"of {', '.join(map(repr, PRECISIONS))}")
    precision.set_defaults(run=_run_precision)


def _add_times(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Describe what measures time."""
    latency = commands.add_parser("latency", help="time models x precisions x threads at batch 1, interleaved")
    latency.add_argument("config", type=Path, help="YAML grid")
    latency.add_argument("--output", type=Path, default=Path("results/latency.csv"), help="CSV; rows are appended")
    latency.add_argument("--minutes", type=float, default=30, help="bound on the rounds of all")
    latency.add_argument("--backbones", nargs="+", help="instead of the grid's")
    latency.add_argument("--precisions", nargs="+", help=f"instead of the grid's; of {', '.join(map(repr, TIMED))}")
    latency.set_defaults(run=_run_latency)

    layers = commands.add_parser("profile", help="say where OpenVINO spends the time of an exported model")
    layers.add_argument("model", type=Path, help="exported model (.xml)")
    layers.add_argument("--size", type=int, default=256, help="side of the image in pixels")
    layers.add_argument("--threads", type=int, default=2, help="threads of OpenVINO")
    layers.add_argument("--rounds", type=int, default=30, help="inferences")
    layers.set_defaults(run=_run_profile)

    steps = commands.add_parser("steps", help="time a training step's parts, beside the published program's way")
    steps.add_argument("--output", type=Path, default=Path("results/steps.csv"), help="CSV; rows are appended")
    steps.add_argument("--backbone", default="resnet18", help="teacher, with random weights")
    steps.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    steps.add_argument("--batch", type=int, default=16, help="images per step")
    steps.add_argument("--rounds", type=int, default=7, help="steps of each way")
    steps.set_defaults(run=_run_steps)


def _add_pictures(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Describe what shows results."""
    report = commands.add_parser("report", help="print Markdown tables of such CSVs, draw pictures")
    report.add_argument("csv", type=Path, help="accuracy CSV")
    report.add_argument("--published", nargs="+", type=Path, default=[], help="YAML grids with published figures")
    report.add_argument("--latency", type=Path, help="latency CSV")
    report.add_argument("--pictures", type=Path, help="folder for pictures")
    report.add_argument(
        "--bubbles",
        action="store_true",
        help="also draw accuracy over latency, a picture per data set, of equal backbones",
    )
    report.set_defaults(run=_run_report)

    gallery = commands.add_parser("gallery", help="draw heat maps of an accuracy grid's models side by side")
    gallery.add_argument("configs", nargs="+", type=Path, help="YAML grids that were run")
    gallery.add_argument("--results", type=Path, default=Path("results"), help="folder of its CSV and checkpoints")
    gallery.add_argument("--output", type=Path, default=Path("results/gallery"), help="folder for pictures")
    gallery.add_argument("--anomalies", action="store_true", help="draw AAND's synthetic anomalies instead")
    gallery.add_argument("--seed", type=int, default=0, help="of the runs to draw")
    gallery.set_defaults(run=_run_gallery)


def _run_accuracy(chosen: argparse.Namespace) -> list[str]:
    index, _, count = chosen.shard.partition("/")
    if not (index.isdigit() and count.isdigit()):
        msg = f"--shard takes i/n, 2/8 for instance, got '{chosen.shard}'"
        raise ValueError(msg)

    def failure(config: Path) -> str:
        try:
            run_accuracy(config, chosen.output, (int(index), int(count)), chosen.best_on_test)
        except (FileNotFoundError, ValueError) as error:
            return str(error)
        return ""

    if failures := list(filter(None, map(failure, chosen.configs))):  # after all grids
        raise ValueError(" ".join(failures))
    return []


def _run_curves(chosen: argparse.Namespace) -> list[str | Path]:
    run_curves(chosen.config, chosen.output)
    return [curves_table(chosen.output), "", *draw_curves(chosen.output, chosen.pictures)]


def _run_analyses(chosen: argparse.Namespace) -> list[str | Path]:
    which = chosen.seed, chosen.data, chosen.models
    pictures = run_analyses(chosen.configs, chosen.results, chosen.output, *which)
    return [analyses_table(chosen.output), "", *pictures]


def _run_latency(chosen: argparse.Namespace) -> list[str]:
    run_latency(chosen.config, chosen.output, chosen.minutes, chosen.backbones, chosen.precisions)
    return []


def _run_precision(chosen: argparse.Namespace) -> list[str]:
    which = chosen.data, chosen.models, chosen.precisions
    run_precision(chosen.config, chosen.results, chosen.output, chosen.seed, *which)
    return [precision_table(chosen.output)]


def _run_profile(chosen: argparse.Namespace) -> list[str]:
    return [layer_table(chosen.model, chosen.size, chosen.threads, chosen.rounds)]


def _run_steps(chosen: argparse.Namespace) -> list[str]:
    return [run_steps(chosen.output, chosen.backbone, chosen.size, chosen.batch, chosen.rounds)]


def _run_report(chosen: argparse.Namespace) -> list[str | Path]:
    texts = [accuracy_table(chosen.csv), ranking_tables(chosen.csv)]
    texts += [published_table(chosen.csv, config) for config in chosen.published]
    pictures = [] if chosen.pictures is None else draw_accuracy(chosen.csv, chosen.pictures)
    if chosen.latency is not None:
        texts.append(latency_table(chosen.latency))
        if chosen.pictures is not None:
            pictures += draw_latency(chosen.latency, chosen.pictures, chosen.csv if chosen.bubbles else None)
    return ["\n\n".join(filter(None, texts)), *pictures]


def _run_gallery(chosen: argparse.Namespace) -> list[Path]:
    if chosen.anomalies:
        return [path for config in chosen.configs for path in draw_anomalies(config, chosen.output)]
    return draw_gallery(chosen.configs, chosen.results, chosen.output, chosen.seed)


if __name__ == "__main__":
    main()
