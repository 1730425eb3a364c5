"""The host finds our models by every one of its ways, in real processes too."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import anomalib.models
import pytest
from anomalib.models import ALLOWED_MODULES, get_model, list_models

import anomalib_rdpp
from anomalib_rdpp.registration import register

ROOT = Path(__file__).parents[1]
INIT = {"backbone": "resnet18", "pre_trained": False}
PROBE = "import anomalib.models as m; print(hasattr(m, 'RDPP'))"


def python(code, *, executable=sys.executable, **environment):
    """Run code in a process of its own, away from the repository."""
    return subprocess.run(
        [str(executable), "-c", code],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    "specification",
    [
        "rdpp",
        "RDPP",
        {"class_path": "RDPP", "init_args": INIT},
        {"class_path": "anomalib.models.RDPP", "init_args": INIT},
        {"class_path": "anomalib_rdpp.RDPP", "init_args": INIT},
        "aand",
        {"class_path": "anomalib_rdpp.AAND", "init_args": INIT},
    ],
    ids=str,
)
def test_get_model_finds_ours(specification):
    arguments = INIT if isinstance(specification, str) else {}
    assert isinstance(get_model(specification, **arguments), anomalib_rdpp.RDPP | anomalib_rdpp.AAND)


def test_registration_is_idempotent():
    before = list(anomalib.models.__all__)
    register()
    assert anomalib.models.__all__ == before
    assert len(set(before)) == len(before)
    assert "anomalib_rdpp" in ALLOWED_MODULES
    assert {"RDPP", "AAND"} <= list_models("pascal")


def test_another_host_version_is_named(monkeypatch):
    monkeypatch.setattr("anomalib_rdpp.registration.version", lambda _: "3.0.0")
    with pytest.warns(UserWarning, match=r"made for anomalib 2\.7, this is 3\.0\.0"):
        register()


@pytest.mark.parametrize(
    "first", ["anomalib.engine", "anomalib.data", "anomalib.models.image.patchcore", "anomalib_rdpp"]
)
def test_editable_install_registers_whatever_is_imported_first(first):
    run = python(f"import {first}; {PROBE}")
    assert run.stdout.strip() == "True", run.stderr
    assert "could not register" not in run.stderr


def test_switch_turns_the_start_up_hook_off():
    assert python(PROBE, ANOMALIB_RDPP_AUTOLOAD="0").stdout.strip() == "False"


def test_a_second_hook_of_the_kind_does_no_harm():
    code = f"import importlib, anomalib_rdpp_autoload as hook; importlib.reload(hook); {PROBE}"
    assert python(code).stdout.strip() == "True"


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
    venv.create(folder, with_pip=True)
    executable = folder / "bin/python"
    install = [str(executable), "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    subprocess.run(install, check=True, timeout=300)
    here = Path(anomalib.__file__).parents[1]
    site_packages = next(folder.glob("lib/python*/site-packages"))
    (site_packages / "lent.pth").write_text(f"{here}\n")
    return executable


def test_wheel_holds_package_and_start_up_module_alone(wheel):
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "anomalib_rdpp",
        "anomalib_rdpp_autoload.py",
        "anomalib_rdpp_autoload.pth",
    }


def test_wheel_holds_the_configs(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"anomalib_rdpp/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} <= set(names)


def test_wheel_registers_in_a_fresh_environment(fresh_python):
    run = python(f"{PROBE}; import anomalib_rdpp; print(anomalib_rdpp.__file__)", executable=fresh_python)
    registered, place = run.stdout.split()
    assert registered == "True", run.stderr
    assert Path(place).is_relative_to(fresh_python.parents[1])


def test_broken_package_costs_one_warning(fresh_python):
    """Python and host start although our package raises. Last: it breaks the fresh environment for good."""
    broken = next(fresh_python.parents[1].glob("lib/python*/site-packages/anomalib_rdpp/__init__.py"))
    broken.write_text("raise RuntimeError('broken on purpose')\n")
    run = python(PROBE, executable=fresh_python)
    assert run.returncode == 0
    assert run.stdout.strip() == "False"
    warning = "could not register its models (RuntimeError: broken on purpose)"
    assert run.stderr.count(warning) == 1
    strict = "import warnings; import anomalib; warnings.simplefilter('error', UserWarning)"
    run = python(f"{strict}; {PROBE}", executable=fresh_python)
    assert run.stdout.strip() == "False", run.stderr
    assert run.stderr.count(warning) == 1


def test_python_starts_when_the_start_up_module_is_gone(fresh_python):
    next(fresh_python.parents[1].glob("lib/python*/site-packages/anomalib_rdpp_autoload.py")).unlink()
    run = python("print('up')", executable=fresh_python)
    assert run.returncode == 0
    assert run.stdout.strip() == "up"
