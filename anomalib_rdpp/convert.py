"""Turn published weights of RD or RD++ into an anomalib checkpoint, or back.

``python -m anomalib_rdpp.convert PUBLISHED.pth MODEL.ckpt --backbone wide_resnet50_2.tv_in1k`` and
``python -m anomalib_rdpp.convert MODEL.ckpt PUBLISHED.pth --to-published``
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from anomalib_rdpp.checkpoints import load_checkpoint, load_published, save_checkpoint, to_published
from anomalib_rdpp.rdpp.lightning_model import RDPP


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and convert; what is wrong with it or with the file is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m anomalib_rdpp.convert",
        description=__doc__.splitlines()[0],
        epilog="The written checkpoint has no thresholds: see help(anomalib_rdpp.load_published).",
    )
    parser.add_argument("checkpoint", type=Path, help="file of the published program; an RDPP checkpoint to go back")
    parser.add_argument("out", type=Path, help="file to write: .ckpt for anomalib, .pth for the published program")
    parser.add_argument("--to-published", action="store_true", help="go back, to the layout of the published programs")
    parser.add_argument(
        "--backbone",
        help="teacher of the file, by its timm name; without tag torchvision's first weights (default: "
        "wide_resnet50_2.tv_in1k)",
    )
    parser.add_argument("--teacher-weights", help="file with the teacher's state dict, instead of a download")
    parser.add_argument(
        "--no-pre-trained", action="store_true", help="leave the teacher random: for trials of the path"
    )
    parser.add_argument("--force", action="store_true", help="write over OUT if it exists")
    options = parser.parse_args(arguments)
    if options.to_published and (options.backbone or options.teacher_weights or options.no_pre_trained):
        parser.error("--to-published takes backbone and teacher from the checkpoint: leave those options out")
    if options.out.exists() and not options.force:
        parser.error(f"'{options.out}' exists: choose another name, or write over it with --force")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        message = _to_published(options) if options.to_published else _to_anomalib(options)
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    sys.stdout.write(f"{message}\n")


def _to_anomalib(options: argparse.Namespace) -> str:
    """Convert a published file; say what comes next."""
    named = {"backbone": options.backbone} if options.backbone else {}
    model = load_published(
        options.checkpoint,
        **named,
        pre_trained=not options.no_pre_trained,
        teacher_weights=options.teacher_weights,
    )
    _write(options.out, lambda path: save_checkpoint(model, path))
    return (
        f"Wrote {options.out}: {_method(model)} with backbone {model.hparams.backbone}. To export it:\n"
        f"  anomalib export {_model_options(model)} --export_type openvino --ckpt_path {options.out}\n"
        "The published file has no thresholds: scores are raw (0 to 6), labels and masks mean nothing until "
        "Engine.validate has run on your data. AUROC and AUPRO need none."
    )


def _to_published(options: argparse.Namespace) -> str:
    """Convert an anomalib checkpoint."""
    model = load_checkpoint(options.checkpoint)
    _write(options.out, lambda path: torch.save(to_published(model), path))
    return f"Wrote {options.out}: {_method(model)} in the published layout, without teacher and thresholds."


def _method(model: RDPP) -> str:
    """Name the method as its authors do."""
    return "RD++" if model.hparams.projection else "RD"


def _model_options(model: RDPP) -> str:
    """Options of anomalib's command line that build a model which takes the checkpoint, without a download."""
    projection = "" if model.hparams.projection else " --model.projection false"
    return f"--model RDPP --model.backbone {model.hparams.backbone} --model.pre_trained false{projection}"


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside the target, then rename: nobody ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
