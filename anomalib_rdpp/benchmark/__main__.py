"""Run benchmarks: ``python -m anomalib_rdpp.benchmark accuracy CONFIG.yaml --output results/accuracy.csv``."""

import argparse
import sys
from pathlib import Path

from .accuracy import run_accuracy
from .report import accuracy_table


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m anomalib_rdpp.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    accuracy = commands.add_parser("accuracy", help="train and test models x data x seeds, one CSV row each")
    accuracy.add_argument("configs", nargs="+", type=Path, help="YAML grids")
    accuracy.add_argument("--output", type=Path, default=Path("results/accuracy.csv"), help="CSV; rows in it are kept")
    accuracy.add_argument("--shard", default="1/1", help="i/n: run every n-th row, from the i-th")
    report = commands.add_parser("report", help="print a Markdown table of such a CSV")
    report.add_argument("csv", type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.command == "report":
            sys.stdout.write(f"{accuracy_table(arguments.csv)}\n")
            return
        index, _, count = arguments.shard.partition("/")
        if not (index.isdigit() and count.isdigit()):
            parser.error(f"--shard takes i/n, 2/8 for instance, got '{arguments.shard}'")
        for config in arguments.configs:
            run_accuracy(config, arguments.output, (int(index), int(count)))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
