"""The house: imports go down the floors, files stay small, every import is declared."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "anomalib_rdpp"
MODULES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {  # parts of the package, of a model's folder too; a new file gets its floor here and in CONTRIBUTING.md
    "teacher": 1,
    "student": 1,
    "anomaly_map": 1,
    "synthesis": 1,
    "pixels": 1,
    "base": 2,
    "export": 2,
    "threshold": 2,
    "metrics": 2,
    "recipe": 2,
    "resize": 2,
    "callbacks": 2,
    "visualizer": 2,
    "torch_model": 3,
    "loss": 3,
    "amplifier": 3,
    "lightning_model": 4,
    "published": 5,  # builds the Lightning class
    "registration": 5,
    "anomalib_rdpp": 5,
    "benchmark": 5,
    "demo": 5,
}
TWINS = {"rdpp": "aand", "aand": "rdpp"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of whatever a file imports, inside of functions too."""
    package = path.relative_to(ROOT).parent.parts if path.is_relative_to(ROOT) else ()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:  # a module itself, or something in one
                name = f"{origin}.{alias.name}"
                yield node.lineno, name if is_module(name) else origin


def is_module(name: str) -> bool:
    place = ROOT.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def floor(name: str) -> int:
    """Floor of a module of ours by its full name."""
    parts = name.split(".")[1:] or ["anomalib_rdpp"]
    part = parts[1] if parts[0] in TWINS and len(parts) > 1 else parts[0]
    if part in TWINS:  # a model's __init__.py holds a docstring
        return 3
    assert part in FLOORS, f"{name} has no floor: give it one in FLOORS and in CONTRIBUTING.md"
    return FLOORS[part]


def test_imports_go_down_the_floors():
    going_up = [
        f"{path.relative_to(ROOT)}:{line} (floor {floor(module_name(path))}) imports {name} (floor {floor(name)})"
        for path in MODULES
        for line, name in imported_names(path)
        if name.split(".")[0] == "anomalib_rdpp" and floor(name) > floor(module_name(path))
    ]
    assert not going_up, "\n".join(going_up)


def test_the_two_models_never_import_each_other():
    for path in MODULES:
        other = TWINS.get(path.parent.name)
        names = [name for _, name in imported_names(path) if other and name.startswith(f"anomalib_rdpp.{other}")]
        assert not names, f"{path} imports {names}"


def test_the_lab_is_imported_by_nothing_of_the_package():
    for path in MODULES:
        assert "experiments" not in {name.split(".")[0] for _, name in imported_names(path)}, path


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_the_package_stays_small():
    users = [path for path in MODULES if path.relative_to(PACKAGE).parts[0] in {"benchmark", "demo"}]
    # The aim was 3,000; pixels, last state, exports of any size, scores, any teacher, ablations came on top.
    assert lines([path for path in MODULES if path not in users]) <= 3555, "the package without benchmark and demo"
    assert lines([path for path in MODULES if path.parent.name == "benchmark"]) <= 1400, "the benchmark"


def declared(*extras: str) -> set[str]:
    """Names of the distributions that pyproject.toml declares, the part before version and extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = sum((project["optional-dependencies"][extra] for extra in extras), project["dependencies"])
    return {normalised(re.split(r"[\[<>=!~; ]", each)[0]) for each in wanted}


def normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("anomalib_rdpp", ()),
        ("startup", ()),
        ("experiments", ()),
        ("tests", ("test", "notebooks")),
        ("hatch_build.py", ("test",)),
    ],
)
def test_every_import_is_declared(folder, extras):
    paths = [ROOT / folder] if folder.endswith(".py") else sorted((ROOT / folder).rglob("*.py"))
    own = {"anomalib_rdpp", "experiments", "anomalib_rdpp_autoload", *(path.stem for path in paths)}
    providers = packages_distributions()
    undeclared = {
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in paths
        for line, name in imported_names(path)
        if (top := name.split(".")[0]) not in sys.stdlib_module_names | own
        and not {normalised(each) for each in providers.get(top, [top])} & declared(*extras)
    }
    assert not undeclared, "\n".join(sorted(undeclared))
