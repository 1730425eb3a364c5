"""What a grid says: models, data, the folders of its runs. Whatever is wrong with it is told before work starts.

``models`` and ``data`` map a name to ``class_path`` and ``init_args``, or name a file that does. docs/benchmark.md has
every key.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml


class Count(int):
    """A whole number above 0."""


# What a key holds: a type, [what each item is], {"": what each value is}, {key: what it holds}, (a list, or a mapping).
ENTRY = {"class_path": str, "init_args": dict, "epochs": Count, "every": Count}
MODEL = {
    **ENTRY, "image_size": Count, "trainer": dict, "callbacks": [dict], "ckpt_path": str, "fill": str, "bank": Count,
}  # fmt: skip
DATA = {**ENTRY, "train_every": Count, "test_every": Count, "categories": ([str], {"": Count}), "joined": [str]}
GRID = {
    "seeds": [int], "image_size": Count, "batch_size": Count, "every": Count, "trainer": dict, "teacher": str,
    "models": {"": MODEL}, "data": {"": DATA}, "published": [dict],
    "threads": [Count], "rounds": Count, "backbones": [str], "precisions": [str],
}  # fmt: skip
WORDS = {Count: "a whole number above 0", int: "a whole number", str: "a text", dict: "a mapping", list: "a list"}


def read_grid(config: Path) -> dict[str, Any]:
    """Read a grid of ``accuracy``; data with ``categories`` become an entry each, ``mvtecad/bottle``.

    Raises:
        ValueError: If a key is missing or holds what it can't, or neither a model nor its data say for how many epochs.
    """
    grid = read_keys(config, {"seeds", "image_size", "batch_size", "models", "data"}, "accuracy")
    grid["data"] = {name: entry for data, part in grid["data"].items() for name, entry in _entries(data, part)}
    for data, part in grid["data"].items():
        for model, own in grid["models"].items():
            if "epochs" not in {**part, **own}:
                msg = f"'{config}' gives no epochs for {model} on {data}: write them at either."
                raise ValueError(msg)
    return grid


def read_keys(config: Path, needed: set[str], benchmark: str) -> dict[str, Any]:
    """Read a YAML file; a key that is missing or holds what it can't is a ``ValueError`` that names file and key."""
    grid = _read_yaml(config)
    if missing := needed - set(grid):
        msg = f"'{config}' is no grid of the {benchmark} benchmark: it has no {', '.join(sorted(missing))}."
        raise ValueError(msg)
    for name in ("models", "data"):
        if isinstance(grid.get(name), str):
            grid[name] = _read_yaml(config.parent / grid[name])
    _check({key: grid[key] for key in GRID if key in grid}, GRID, f"'{config}'")  # others may hold YAML's anchors
    return grid


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read a file that holds a mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        msg = f"'{path}' is no YAML: {' '.join(str(error).split())}"
        raise ValueError(msg) from error
    _check(content, dict, f"'{path}'")
    return content


def _check(value: Any, wanted: Any, where: str) -> None:  # noqa: ANN401
    """Compare what a key holds with what it should hold, and so on for what is in it."""
    if isinstance(wanted, tuple):
        wanted = wanted[isinstance(value, dict)]
    kind = wanted if isinstance(wanted, type) else type(wanted)
    is_count = kind is Count and type(value) is int and value > 0
    if not (is_count or type(value) is kind) or value == [] or (value == {} and "" in wanted):
        msg = f"{where} must be {WORDS[kind]}, got {str(value)[:60]!r}."
        raise ValueError(msg)
    if isinstance(wanted, list):
        for number, item in enumerate(value, 1):
            _check(item, wanted[0], f"{where}, {number}")
    elif isinstance(wanted, dict):
        unknown = [key for key in value if key not in wanted and "" not in wanted]
        missing = [key for key in ("class_path",) if key in wanted and key not in value]
        if unknown or missing:
            told = f"has no {missing[0]}" if missing else f"has an unknown key {unknown[0]!r}"
            msg = f"{where} {told}; keys are {', '.join(wanted)}."
            raise ValueError(msg)
        for key, item in value.items():
            _check(key, str, f"{where}, {key!r}")
            _check(item, wanted.get(key, wanted.get("")), f"{where}, {key}")


def _entries(data: str, part: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give each category an entry, with its own epochs where ``categories`` is a mapping."""
    categories = part.get("categories")
    for category in categories or ():
        own = {"epochs": categories[category]} if isinstance(categories, dict) else {}
        yield f"{data}/{category}", {**part, **own, "init_args": {**part.get("init_args", {}), "category": category}}
    if not categories:
        yield data, part


def refuse_unknown(chosen: Sequence[str] | None, known: Iterable[str]) -> None:
    """Compare names that a user chose with those that there are."""
    if unknown := set(chosen or ()) - set(known):
        msg = f"Unknown {', '.join(map(repr, sorted(unknown)))}; choose of {', '.join(map(repr, known))}."
        raise ValueError(msg)


def models_on_data(grids: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Map the data of all grids to their models, and each model to its grid; no model twice on the same data."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for grid in grids:
        for data in grid["data"]:
            models = found.setdefault(data, {})
            if twice := models.keys() & grid["models"].keys():
                msg = f"Two grids have {', '.join(map(repr, sorted(twice)))} on {data}: rename it in one grid."
                raise ValueError(msg)
            models |= dict.fromkeys(grid["models"], grid)
    return found


def runs_of(grid: dict[str, Any]) -> list[tuple[str, str, int]]:
    """Data, model and seed of each run; seeds outermost, so that a grid that is cut short compares all models."""
    return [(data, model, seed) for seed in grid["seeds"] for data in grid["data"] for model in grid["models"]]


def epochs_of(grid: dict[str, Any], data: str, model: str) -> int:
    """Epochs of the model where it names its own, else of the data."""
    return {**grid["data"][data], **grid["models"][model]}["epochs"]


def run_folder(grid: dict[str, Any], data: str, model: str, seed: int, results: Path) -> Path:
    """Name the folder of a run's checkpoint; grids that differ in size, batch or epochs may share ``results``."""
    settings = f"{grid['image_size']}px_batch{grid['batch_size']}_{epochs_of(grid, data, model)}epochs_seed{seed}"
    return results / data / model / settings


def row_names(grid: dict[str, Any], name: str) -> list[str]:
    """Name the data of the rows that a run becomes: one, with joined categories one each."""
    return [f"{name}/{category}" for category in grid["data"][name].get("joined", ())] or [name]
