"""Run benchmarks: ``python -m anomalib_rdpp.benchmark COMMAND ...``; docs/benchmark.md leads through them."""

from collections.abc import Sequence

from .accuracy import run_accuracy
from .cli import run
from .gallery import run_gallery
from .latency import run_latency
from .precision import run_precision
from .report import run_report

COMMANDS = [run_accuracy, run_precision, run_latency, run_report, run_gallery]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    commands = {command.__name__.removeprefix("run_"): command for command in COMMANDS}
    run("python -m anomalib_rdpp.benchmark", commands, arguments)


if __name__ == "__main__":
    main()
