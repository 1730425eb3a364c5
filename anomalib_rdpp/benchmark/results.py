"""CSV files of results: rows are appended as soon as they are known, and a line that was cut short spoils no other."""

import csv
import logging
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch.utilities import rank_zero_only

logger = logging.getLogger(__name__)


@dataclass
class Results:
    """One CSV file: what is done, what failed, what is known; a file that is no such table is a ``ValueError``.

    A line of column names holds until the next one, so that files of different versions may be joined by ``cat``.
    """

    command: str  # what writes such files
    columns: Sequence[str]
    key: Sequence[str]  # columns that tell runs apart
    numbers: Sequence[str]  # columns that hold numbers
    before: dict[str, str] = field(default_factory=dict, kw_only=True)  # what rows mean that are older than a column
    path: Path  # there need not be a file yet

    def __post_init__(self) -> None:
        self.rows()  # what is wrong with the file is told before work starts

    def done(self, row: dict[str, Any]) -> bool:
        """Tell whether the file has this row, and not as a failure."""
        key = [str(row[name]) for name in self.key]
        return any(key == [known[name] for name in self.key] and not known["error"] for known in self.rows())

    @contextmanager
    def run(self, *rows: dict[str, Any]) -> Iterator[None]:
        """Do what is inside for these rows; if it fails, they are appended with its error, and all goes on."""
        try:
            yield
        except Exception as error:
            logger.exception("%s failed", ", ".join(str(rows[0].get(name)) for name in self.key))
            for row in rows:
                self.append({**row, "error": f"{type(error).__name__}: {error}"})

    @rank_zero_only
    def append(self, row: dict[str, Any]) -> None:
        """Append one row, on a line of its own even if the one before was cut short."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self._text()
        headers = [cells for cells in map(_cells, text.splitlines()) if self._is_header(cells)]
        with self.path.open("a", newline="", encoding="utf-8") as file:
            if text and not text.endswith("\n"):
                file.write("\n")
            writer = csv.DictWriter(file, self.columns)
            if headers[-1:] != [list(self.columns)]:
                writer.writeheader()
            writer.writerow({name: " ".join(str(value).splitlines()) for name, value in row.items()})

    def rows(self) -> list[dict[str, str]]:
        """Read the whole rows; none if there is no file. A column that the file lacks is empty."""
        rows, names = [], None
        for cells in map(_cells, self._text().splitlines()):
            if self._is_header(cells):
                names = cells
            elif names is None:
                expected, found = ",".join(self.columns[:4]), ",".join(cells)[:80]
                msg = f"'{self.path}' is no table of `{self.command}`: it begins with '{found}', not '{expected},...'."
                raise ValueError(msg)
            elif len(cells) == len(names):
                row = dict.fromkeys(self.columns, "") | dict(zip(names, cells, strict=True))
                rows.append(row | {name: row[name] or value for name, value in self.before.items()})
        return rows

    def frame(self) -> pd.DataFrame:
        """Read the rows, of those with the same key the last.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If a column of numbers holds something else.
        """
        if not self.path.is_file():
            msg = f"No results at '{self.path}': run `python -m {self.command} GRID --output {self.path}` first."
            raise FileNotFoundError(msg)
        frame = pd.DataFrame(self.rows(), columns=self.columns).drop_duplicates(list(self.key), keep="last")
        try:
            frame[list(self.numbers)] = frame[list(self.numbers)].apply(pd.to_numeric)
        except ValueError as error:
            msg = f"'{self.path}' has something else where `{self.command}` writes numbers: {error}."
            raise ValueError(msg) from error
        return frame

    def _is_header(self, cells: list[str]) -> bool:
        """Tell column names, of other versions too, from a row whose first cell is such a name: rows have numbers."""
        return cells[:1] == [self.columns[0]] and all(map(str.isidentifier, cells)) and self.key[1] in cells

    def _text(self) -> str:
        """Read the file, with the mark that spreadsheets put before it or without."""
        return self.path.read_text(encoding="utf-8-sig", errors="replace") if self.path.exists() else ""


def _cells(line: str) -> list[str]:
    return next(csv.reader([line]), [])


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Make a Markdown table of rows."""
    return pd.DataFrame(rows).fillna("-").to_markdown(index=False, tablefmt="github", disable_numparse=True)


def commit() -> str:
    """Name the commit of this package, empty where there is none."""
    git, here = shutil.which("git"), Path(__file__)
    ask = partial(subprocess.run, capture_output=True, text=True, check=False, cwd=here.parent)
    is_ours = git and ask([git, "ls-files", here.name]).stdout
    return ask([git, "describe", "--always", "--dirty"]).stdout.strip() if is_ours else ""
