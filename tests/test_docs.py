"""What the documents point at exists; what they tell a user to type works as printed."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

from anomalib_rdpp import RDPP, to_published
from anomalib_rdpp.checkpoints import save_checkpoint

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md", "index.md": "README.md"}  # docs/hooks.py
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What a test can't have as printed: images of the reader's, 200 epochs, a teacher by download.
STAND_INS = {
    "/path/to/images": "images",
    "--trainer.max_epochs 200": "--trainer.max_epochs 1",
    "--model RDPP": "--model RDPP --model.backbone resnet18 --model.pre_trained false",
    "convert PUBLISHED.pth MODEL.ckpt": "convert PUBLISHED.pth MODEL.ckpt --backbone resnet18 --no-pre-trained",
}


def blocks(document: str, language: str = "") -> list[str]:
    """Blocks of a document in a language; shell commands have none."""
    return [text for name, text in FENCE.findall((ROOT / document).read_text()) if name == language]


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
def test_documentation_builds_strictly(tmp_path):
    if find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: make docs installs it")
    run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")], ROOT)
    assert "Teacher network by its timm name" in (tmp_path / "site/guide/index.html").read_text()


@pytest.fixture
def desk(tiny_folder, tmp_path) -> Path:
    """Folder with what the documents take for granted: images, a checkpoint or a published file."""
    shutil.copytree(tiny_folder, tmp_path / "images")
    for part in ("test", "ground_truth"):
        (tmp_path / "images" / part / "square").rename(tmp_path / "images" / part / "defect")
    model = RDPP("resnet18", pre_trained=False)
    save_checkpoint(model, tmp_path / "MODEL.ckpt")
    torch.save(to_published(model), tmp_path / "PUBLISHED.pth")
    Image.new("RGB", (300, 200), "grey").save(tmp_path / "part.png")
    return tmp_path


def run(arguments: list[str], folder: Path) -> None:
    """Run a command in a folder, with this Python's commands and this source first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{arguments[-1]}\n{ran.stdout[-1000:]}{ran.stderr[-3000:]}"


def shell(block: str, folder: Path) -> None:
    """Run a block of shell commands as printed, but for the stand-ins and for what sets up an environment."""
    for printed, stand_in in STAND_INS.items():
        block = block.replace(printed, stand_in)
    lines = [line for line in block.splitlines() if not line.startswith(("pip install", "make "))]
    run(["bash", "-euo", "pipefail", "-c", "\n".join(lines)], folder)


SHELL_BLOCKS = [
    pytest.param(block, id=f"{document}-{number}")
    for document in ("README.md", "docs/edge.md")
    for number, block in enumerate(blocks(document))
    if not block.startswith("make ")  # the demo has its own test
]


@pytest.mark.slow
@pytest.mark.parametrize("block", SHELL_BLOCKS)
def test_shell_block_runs_as_printed(block, desk):
    if "convert PUBLISHED.pth MODEL.ckpt" in block:
        (desk / "MODEL.ckpt").unlink()  # the block makes it
    shell(block, desk)
    written = list(desk.rglob("model.xml"))
    assert len(written) == block.count("--export_type")


@pytest.mark.slow
def test_python_block_of_the_edge_page_runs_as_printed(desk):
    export, program = blocks("docs/edge.md")[0].splitlines()[0], blocks("docs/edge.md", "python")[0]
    shell(export, desk)
    for suffix in (".xml", ".bin"):
        next(desk.rglob(f"model{suffix}")).rename(desk / f"model{suffix}")
    run([sys.executable, "-c", program], desk)
