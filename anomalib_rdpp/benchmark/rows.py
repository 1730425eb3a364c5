"""CSV files of results: rows are appended as soon as they are known, and a line that was cut short spoils no other."""

import csv
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read the whole rows of a CSV; none if there is no such file. A column that the file lacks is empty.

    A line of column names holds until the next one, so that files of different versions may be joined by ``cat``.
    """
    if not path.exists():
        return []
    rows, names = [], list(columns)
    for line in path.read_text().splitlines():
        cells = next(csv.reader([line]), [])
        if _is_header(cells, columns):
            names = cells
        elif len(cells) == len(names):
            rows.append({**dict.fromkeys(columns, ""), **dict(zip(names, cells, strict=True))})
    return rows


def _is_header(cells: list[str], columns: Sequence[str]) -> bool:
    """Tell column names, of other versions too, from a row whose first cell is such a name: each row has numbers."""
    return cells[:1] == [columns[0]] and all(map(str.isidentifier, cells))


def append_row(path: Path, columns: Sequence[str], row: dict[str, Any]) -> None:
    """Append one row, on a line of its own even if the one before was cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    headers = [line for line in lines if _is_header(line.split(","), columns)]
    with path.open("a", newline="") as file:
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            file.write("\n")
        writer = csv.DictWriter(file, columns)
        if headers[-1:] != [",".join(columns)]:
            writer.writeheader()
        writer.writerow({name: _one_line(value) for name, value in row.items()})


def _one_line(value: object) -> object:
    """Keep a message of several lines from becoming several rows."""
    return " ".join(value.splitlines()) if isinstance(value, str) else value


def commit() -> str:
    """Name the commit of this package, empty where there is none."""
    git = shutil.which("git")
    if not git:
        return ""

    def ask(*arguments: str) -> str:
        command = [git, "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603

    return ask("describe", "--always", "--dirty") if ask("ls-files", Path(__file__).name) else ""
