"""anomalib finds our models by every one of its ways, in real processes too."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import anomalib.models
import pytest
import yaml
from anomalib.models import ALLOWED_MODULES, get_model, list_models
from tiny import TINY

import anomalib_rdpp
from anomalib_rdpp.registration import register

ROOT = Path(__file__).parents[1]
PROBE = "import anomalib.models as m; print(hasattr(m, 'RDPP'))"

# Imports what takes seconds and is not anomalib's, once; then each code of the list in a process forked from this one.
FORKS = """
import json, os, sys
import cv2, kornia, lightning.pytorch, matplotlib.pyplot, pandas, scipy.signal, skimage, sklearn.metrics, timm, torch
import torchmetrics, torchvision.transforms.v2
assert "anomalib" not in sys.modules
for number, code in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0, code
        continue
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{sys.argv[2]}/{number}.{name}", os.O_CREAT | os.O_WRONLY), stream)
    exec(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
"""


def python(code, *arguments, executable=sys.executable, **environment):
    """Run code in a process of its own, away from the repository."""
    if executable != sys.executable:  # it has a package of its own
        environment = {"PYTHONPATH": "", **environment}
    return subprocess.run(
        [str(executable), "-c", code, *arguments],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, **environment},
    )


def forks(codes, folder, executable=sys.executable):
    """Run each code in a process that has not imported anomalib yet; give what each printed and complained."""
    run = python(FORKS, json.dumps(codes), str(folder), executable=executable)
    assert run.returncode == 0, run.stderr
    return [[(folder / f"{number}.{name}").read_text() for name in ("out", "err")] for number in range(len(codes))]


@pytest.mark.parametrize(
    "specification",
    [
        "rdpp",
        "RDPP",
        {"class_path": "RDPP", "init_args": TINY},
        {"class_path": "anomalib.models.RDPP", "init_args": TINY},
        {"class_path": "anomalib_rdpp.RDPP", "init_args": TINY},
        "anomalib_rdpp.RDPP",
        "aand",
        {"class_path": "anomalib_rdpp.AAND", "init_args": TINY},
    ],
    ids=str,
)
def test_get_model_finds_ours(specification):
    arguments = TINY if isinstance(specification, str) else {}
    assert isinstance(get_model(specification, **arguments), anomalib_rdpp.RDPP | anomalib_rdpp.AAND)


def test_registration_is_idempotent():
    before = list(anomalib.models.__all__)
    register()
    assert anomalib.models.__all__ == before
    assert len(set(before)) == len(before)
    assert "anomalib_rdpp" in ALLOWED_MODULES
    assert {"RDPP", "AAND"} <= list_models("pascal")


def test_another_anomalib_is_named(monkeypatch):
    monkeypatch.setattr("anomalib_rdpp.registration.version", lambda _: "3.0.0")
    with pytest.warns(UserWarning, match=r"made for anomalib 2\.7, this is 3\.0\.0"):
        register()


FIRST = ["anomalib.engine", "anomalib.data", "anomalib.models.image.patchcore", "anomalib_rdpp"]
SECOND_HOOK = f"import importlib, anomalib_rdpp_autoload as hook; importlib.reload(hook); {PROBE}"


def test_editable_install_registers_whatever_is_imported_first(tmp_path):
    codes = [*(f"import {first}; {PROBE}" for first in FIRST), SECOND_HOOK]
    for code, (printed, complaint) in zip(codes, forks(codes, tmp_path), strict=True):
        assert printed.strip() == "True", f"{code}: {complaint}"
        assert "could not register" not in complaint


@pytest.mark.parametrize(("switch", "count"), [("1", "1"), ("0", "0")])
def test_switch_turns_the_start_up_hook_off(switch, count):
    code = "import sys; print([type(finder).__name__ for finder in sys.meta_path].count('RegisterAfterImport'))"
    assert python(code, ANOMALIB_RDPP_AUTOLOAD=switch).stdout.strip() == count


def test_hook_leaves_a_loader_that_it_does_not_know_alone():
    code = """
import sys, types, anomalib_rdpp_autoload
hook = anomalib_rdpp_autoload.RegisterAfterImport()
sys.meta_path = [hook, types.SimpleNamespace(find_spec=lambda *_: types.SimpleNamespace(loader=None))]
print(hook.find_spec("anomalib.models").loader)
"""
    assert python(code).stdout.strip() == "None"


def test_interpreter_start_imports_nothing_but_the_hook():
    code = "import sys; print([m for m in sys.modules if m.split('.')[0] in ('anomalib', 'anomalib_rdpp', 'torch')])"
    assert python(code).stdout.strip() == "[]"
    assert python("import sys; print('anomalib_rdpp_autoload' in sys.modules)").stdout.strip() == "True"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert list(folder.glob("*.tar.gz")), "the sdist builds too, and the wheel from it"
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def fresh_python(wheel, tmp_path_factory) -> Path:
    """A venv with the wheel installed, the dependencies lent from here (but no start-up files: those are not lent)."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder)
    executable = folder / "bin/python"
    install = ["install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(executable), *install], check=True, timeout=300)
    here = Path(anomalib.__file__).parents[1]
    (site_packages(executable) / "lent.pth").write_text(f"{here}\n")
    return executable


def site_packages(executable) -> Path:
    return next(executable.parents[1].glob("lib/python*/site-packages"))


def test_wheel_holds_package_and_start_up_module_alone(wheel):
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "anomalib_rdpp",
        "anomalib_rdpp_autoload.py",
        "anomalib_rdpp_autoload.pth",
    }


def test_wheel_holds_the_configs_of_trainings_but_no_grid_and_nothing_of_our_machines(wheel):
    archive = zipfile.ZipFile(wheel)
    configs = {f"anomalib_rdpp/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert {name for name in archive.namelist() if name.endswith((".yaml", ".yml", ".csv"))} == configs
    assert "anomalib_rdpp/py.typed" in archive.namelist()
    assert all("model" in yaml.safe_load(archive.read(name)) for name in configs), "a grid has no single model"
    assert not [name for name in archive.namelist() if b"../shared" in archive.read(name)]


def test_wheel_registers_in_a_fresh_environment_and_costs_one_warning_when_broken(fresh_python, tmp_path):
    """Python and anomalib start although our package raises."""
    broken = site_packages(fresh_python) / "anomalib_rdpp/__init__.py"
    breaking = f"open({str(broken)!r}, 'w').write('raise RuntimeError(\"broken on purpose\")')"
    strict = "import warnings; import anomalib; warnings.simplefilter('error', UserWarning)"
    codes = [
        f"{PROBE}; import anomalib_rdpp; print(anomalib_rdpp.__file__)",
        f"{breaking}; {PROBE}",
        f"{strict}; {PROBE}",
    ]
    (printed, complaint), *broken_ones = forks(codes, tmp_path, fresh_python)
    registered, place = printed.split()
    assert registered == "True", complaint
    assert Path(place).is_relative_to(fresh_python.parents[1])
    for printed, complaint in broken_ones:
        assert printed.strip() == "False", complaint
        assert complaint.count("could not register its models (RuntimeError: broken on purpose)") == 1


def test_python_starts_when_the_start_up_module_is_gone(fresh_python):
    (site_packages(fresh_python) / "anomalib_rdpp_autoload.py").unlink()
    run = python("print('up')", executable=fresh_python)
    assert run.returncode == 0
    assert run.stdout.strip() == "up"
