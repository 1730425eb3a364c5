"""CSV files of results: rows are appended as soon as they are known, and a line that was cut short spoils no other."""

import csv
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read the whole rows of a CSV; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = csv.DictReader(file, columns)
        return [row for row in rows if None not in row.values() and row[columns[0]] != columns[0]]  # no header


def append_row(path: Path, columns: Sequence[str], row: dict[str, Any]) -> None:
    """Append one row, on a line of its own even if the one before was cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else ""
    with path.open("a", newline="") as file:
        if text and not text.endswith("\n"):
            file.write("\n")
        writer = csv.DictWriter(file, columns)
        if not text:
            writer.writeheader()
        writer.writerow(row)


def commit() -> str:
    """Name the commit of this package, empty where there is none."""
    git = shutil.which("git")
    if not git:
        return ""
    command = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603
