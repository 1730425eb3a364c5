"""What the documents point at exists; what they tell a user to type works as printed."""

import html
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.cli import cli
from anomalib.deploy import OpenVINOInferencer
from PIL import Image

from anomalib_rdpp import RDPP, to_published

pytestmark = pytest.mark.no_cover  # the same commands are covered in tests/test_contract.py
ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md", "index.md": "README.md"}  # docs/hooks.py
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What a test can't have as printed: images of the reader's, a teacher by download, a wide network, 200 epochs.
BACKBONE = "test_resnet"
STAND_INS = {
    "/path/to/images": "images",
    "/path/to/new/images": "images/test/defect",
    "configs/": f"{ROOT}/configs/",
    "max_epochs=200, check_val_every_n_epoch=10": "max_epochs=1",
    "RDPP()": f"RDPP('{BACKBONE}', pre_trained=False, pre_processor=RDPP.configure_pre_processor((64, 64)))",
    "seed=0)": "seed=0, num_workers=0)",
}
SMALL = f"--model.backbone {BACKBONE} --model.pre_trained false"
APPENDED = {
    "anomalib train": f"{SMALL} --data.num_workers 0 --trainer.max_epochs 1 --trainer.check_val_every_n_epoch 1 "
    "--model.pre_processor anomalib.pre_processing.PreProcessor "
    "--model.pre_processor.transform torchvision.transforms.v2.Resize --model.pre_processor.transform.size [64,64]",
    "anomalib predict": SMALL,
    "anomalib export": SMALL,  # the throwaway model that is built before the checkpoint is read
    "python -m anomalib_rdpp.published bottle.pth": "--backbone resnet18 --no-pre-trained",
}


def blocks(document: str, language: str = "") -> list[str]:
    """Blocks of a document in a language; shell commands have none."""
    return [text for name, text in FENCE.findall((ROOT / document).read_text()) if name == language]


def commands(document: str) -> list[str]:
    """Commands of a document's shell blocks, each in a line."""
    lines = "".join(blocks(document)).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if not line.startswith(("pip install ", "make "))]


def anchors(document: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_anchors_of_documents_exist(document):
    for target, anchor in LINK.findall(FENCE.sub("", document.read_text())):
        is_page = document.parent.name == "docs" and target in PAGES
        path = ROOT / PAGES[target] if is_page else document.parent / target if target else document
        assert path.exists(), f"{document.name} points at {target}"
        if anchor:
            assert anchor in anchors(path), f"{document.name} points at {target}#{anchor}"


@pytest.mark.slow
def test_documentation_builds_strictly_and_shows_values(tmp_path):
    if find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: make docs installs it")
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    ran = subprocess.run(mkdocs, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    guide, api = (html.unescape((tmp_path / f"site/{page}/index.html").read_text()) for page in ("guide", "api"))
    assert "Teacher network by its timm name" in guide
    assert "<code>f'" not in guide + api  # defaults are values


class Desk:
    """A folder with images of odd sizes, where the documents' commands are run in this process, each once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.printed: dict[str, str] = {}
        generator = np.random.default_rng(0)
        for name, count in (("train/good", 6), ("test/good", 4), ("test/defect", 4)):
            for i in range(count):
                height, width = ((90, 117), (117, 90), (101, 77))[i % 3]
                pixels = generator.integers(90, 120, (height, width, 3), dtype=np.uint8)
                if name == "test/defect":
                    pixels[20:50, 30:60] = 250
                path = folder / "images" / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        Image.fromarray(generator.integers(90, 120, (200, 300, 3), dtype=np.uint8)).save(folder / "part.png")
        torch.save(to_published(RDPP("resnet18", pre_trained=False)), folder / "bottle.pth")

    def run(self, command: str, capsys: pytest.CaptureFixture) -> str:
        """Run a command as printed, but for the stand-ins; give back what it printed."""
        if command not in self.printed:
            appended = next((options for start, options in APPENDED.items() if command.startswith(start)), "")
            program, *arguments = shlex.split(f"{replace(command)} {appended}", comments=True)
            capsys.readouterr()
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(self.folder)
                patch.setattr(sys, "argv", [program, *arguments])
                if program == "anomalib":
                    cli.main()
                else:
                    assert [program, arguments[0]] == ["python", "-m"], command
                    patch.setattr(sys, "argv", arguments[1:])
                    patch.delitem(sys.modules, arguments[1], raising=False)  # else Python warns that it was imported
                    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            self.printed[command] = capsys.readouterr().out
        return self.printed[command]


def replace(text: str) -> str:
    """Put the stand-ins into a command or program."""
    for printed, stand_in in STAND_INS.items():
        text = text.replace(printed, stand_in)
    return text


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"))


@pytest.fixture
def trained(desk, capsys) -> Desk:
    """The desk after README's training."""
    desk.run(commands("README.md")[0], capsys)
    return desk


def test_documents_name_the_commands_that_a_user_needs():
    typed = [" ".join(command.split()[:2]) for command in commands("README.md")]
    assert typed == ["anomalib train", "anomalib predict", "anomalib export", "anomalib export"]
    assert len(commands("docs/guide.md")) == 7
    assert len(commands("docs/edge.md")) == 3


def parameters(document: str) -> list:
    """Each command of a document, by its place; slow is what other tests or commands do nearly alike."""
    is_slow = re.compile("configs/|export(?!.*INT8_PTQ)|bottle.ckpt")
    return [
        pytest.param(command, id=f"{document}-{i}", marks=[pytest.mark.slow] if is_slow.search(command) else [])
        for i, command in enumerate(commands(document))
    ]


@pytest.mark.parametrize(
    "command", [*parameters("README.md"), *parameters("docs/guide.md"), *parameters("docs/edge.md")]
)
def test_command_runs_as_printed(command, trained, tmp_path, capsys):
    if "configs/" in command:
        trained = Desk(tmp_path)  # of its own: the other commands read README's training
    trained.run(command, capsys)
    if command.startswith("anomalib export"):
        root = re.search(r"--export_root (\S+)|$", command)[1] or "results"
        assert (trained.folder / root / "weights/openvino/model.xml").is_file()
    elif command.startswith("anomalib predict"):
        pictures = trained.folder.glob("results/RDPP/latest/images/**/*.png")
        assert {path.name for path in pictures} == {"0.png", "1.png", "2.png", "3.png"}
        table = (trained.folder / "results/RDPP/latest/images/scores.csv").read_text().splitlines()
        assert len(table) == 1 + 4


def test_test_after_train_gives_the_same_figures(trained, capsys):
    test = next(command for command in commands("docs/guide.md") if command.startswith("anomalib test"))
    figures = [
        re.findall(r"(\w+_\w+)\s+│\s+([\d.]+)", trained.run(command, capsys))
        for command in (commands("README.md")[0], test)
    ]
    assert [name for name, _ in figures[0]] == ["image_AUROC", "image_F1Score"]
    assert figures[0] == figures[1]


@pytest.fixture
def exported(trained, capsys) -> Path:
    """Folder of the model that README's INT8 command writes."""
    trained.run(commands("README.md")[-1], capsys)
    return trained.folder / "results/int8/weights/openvino"


def test_int8_command_gives_a_model_for_any_size(desk, exported):
    inferencer = OpenVINOInferencer(exported / "model.xml")
    for path in (desk.folder / "part.png", *desk.folder.glob("images/test/defect/*.png")):
        assert 0 <= inferencer.predict(path).pred_score.item() <= 1


def test_python_of_the_edge_page_runs_as_printed(desk, exported, monkeypatch):
    monkeypatch.chdir(exported)
    shutil.copy(desk.folder / "part.png", ".")
    exec("\n".join(blocks("docs/edge.md", "python")), {})


@pytest.mark.slow
def test_python_block_of_the_readme_runs_as_printed(desk, monkeypatch):
    monkeypatch.chdir(desk.folder)
    exec(replace(blocks("README.md", "python")[0]), {})
