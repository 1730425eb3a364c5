"""Published weights of RD and RD++, in and out.

``python -m anomalib_rdpp.published PUBLISHED.pth MODEL.ckpt --backbone wide_resnet50_2.tv_in1k`` and
``python -m anomalib_rdpp.published MODEL.ckpt PUBLISHED.pth --to-published``

The authors' official code saves the state dicts of what it trains: ``bn``, ``decoder`` and, in RD++, ``proj``.
Bottleneck and decoder have anomalib's names there; the projections are ``proj_a``, ``proj_b``, ``proj_c``, fine to
coarse. No file holds the teacher, which is torchvision's first ImageNet network (``tv_in1k``) for all of them.

Source: files of the official code of RD (Deng & Li, CVPR 2022) and RD++ (Tien et al., CVPR 2023), both MIT.
"""

import argparse
import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from anomalib_rdpp.rdpp.lightning_model import RDPP
from anomalib_rdpp.rdpp.torch_model import RDPPModel
from anomalib_rdpp.student import PAPER
from anomalib_rdpp.teacher import architecture

SCALES = "abc"  # how the official code names its projections, fine to coarse
PARTS = ({"bn", "decoder"}, {"bn", "decoder", "proj"})  # of RD, of RD++

Weights = dict[str, dict[str, torch.Tensor]]


def load_published(
    path: str | Path,
    backbone: str = "wide_resnet50_2.tv_in1k",
    pre_trained: bool = True,
    teacher_weights: str | None = None,
) -> RDPP:
    """Load a file of RD++'s or RD's official code.

    The file has no thresholds. Until ``Engine.validate`` has found them on your data, scores and maps are the raw ones,
    from 0 to 6, and anomalib's post-processor compares them with 0.5: labels, masks and F1 mean nothing yet, while
    AUROC and AUPRO need no threshold. ``anomalib validate`` keeps nothing; in Python, what follows has thresholds::

        engine.validate(model, datamodule=data)
        engine.export(model, "openvino")
        engine.trainer.save_checkpoint("model.ckpt")

    Args:
        path: The file. With ``proj`` it is RD++, without it RD, a model without projection.
        backbone: timm name of the teacher that the file was trained with. Without tag, and if ImageNet weights are
            fetched, it is torchvision's first set (``tv_in1k``), the authors' own, and not timm's default.
        pre_trained: Whether the teacher takes ImageNet weights, from timm's cache or by download.
        teacher_weights: File with the teacher's state dict (.pt, .pth, .safetensors), instead of a download.

    Returns:
        The model, in training mode as if newly built: call ``eval()`` before you call it by hand.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it can't be loaded safely, is damaged, is of other code or of another backbone.

    Examples:
        >>> from tempfile import mkdtemp
        >>> path = f"{mkdtemp()}/published.pth"
        >>> torch.save(to_published(RDPP("resnet18", pre_trained=False)), path)
        >>> model = load_published(path, "resnet18", pre_trained=False).eval()
    """
    weights = read_published(path, backbone)  # before the teacher, which may have to be fetched
    if pre_trained and teacher_weights is None and "." not in backbone:
        backbone = f"{backbone}.tv_in1k"
    model = RDPP(backbone, pre_trained=pre_trained, teacher_weights=teacher_weights, projection="proj" in weights)
    for part, network in _parts(model.model).items():
        network.load_state_dict(weights[part])
    return model


def to_published(model: RDPP) -> Weights:
    """Give copies of a model's weights in the published layout: no teacher, no thresholds, no hyper-parameters.

    Args:
        model: RD++, or RD, that is ``RDPP(projection=False)``.

    Raises:
        ValueError: If student or projection are not the papers'.
    """
    if type(model.model.student).__name__ != "Student" or model.hparams.projection == "light":
        msg = "The published layout holds the papers' student and projection alone; this model's are light ones."
        raise ValueError(msg)
    return {
        part: {name: value.cpu().clone() for name, value in network.state_dict().items()}
        for part, network in _parts(model.model).items()
    }


def read_published(path: str | Path, backbone: str) -> Weights:
    """Read a published file and check every name, shape and number; errors as of ``load_published``.

    Returns exactly the tensors of the layout. ``memory`` entries, left over in some files, are dropped; counters of
    BatchNorm batches, absent from some, are 0; ``module.`` before each name, of DataParallel, is stripped.
    """
    stored = _read(path)
    if set(stored) not in PARTS or not all(isinstance(values, dict) for values in stored.values()):
        msg = (
            f"'{path}' holds {_listed(stored)}; expected the state dicts bn and decoder (RD), or bn, decoder and proj "
            "(RD++). Give a file that the official code wrote; a checkpoint of anomalib needs no conversion."
        )
        raise ValueError(msg)
    if architecture(backbone) not in PAPER:
        msg = f"No published file has backbone '{backbone}'; choose one of {', '.join(PAPER)}, with or without tag."
        raise ValueError(msg)
    stored = {
        f"{part}.{str(name).removeprefix('module.')}": value
        for part, values in stored.items()
        for name, value in values.items()
    }
    is_projecting = any(name.startswith("proj.") for name in stored)
    expected = _expected(architecture(backbone), is_projecting)
    if wrong := _differences(stored, expected):
        fitting = [name for name in PAPER if not _differences(stored, _expected(name, is_projecting))]
        advice = f"It fits {fitting[0]}: name that backbone." if fitting else "No other backbone fits it either."
        msg = (
            f"'{path}' doesn't fit backbone '{backbone}': {len(wrong)} entries are missing, unknown or of another "
            f"shape ({_listed(wrong)}). {advice}"
        )
        raise ValueError(msg)
    if broken := [name for name in expected if name in stored and not torch.isfinite(stored[name]).all()]:
        msg = (
            f"'{path}' holds NaN or infinite numbers in {len(broken)} entries ({_listed(broken)}): its training "
            "diverged or the file is damaged. Take an earlier file, or fetch it again."
        )
        raise ValueError(msg)
    weights: Weights = {}
    for name, shape in expected.items():
        part, _, key = name.partition(".")
        weights.setdefault(part, {})[key] = stored.get(name, torch.zeros(shape, dtype=torch.long))
    return weights


def load_checkpoint(path: str | Path) -> RDPP:
    """Load an anomalib checkpoint of ``RDPP``; what is wrong with another file is a ``ValueError``."""
    stored = _read(path)
    if "state_dict" not in stored or "pytorch-lightning_version" not in stored:
        msg = (
            f"'{path}' is no anomalib checkpoint: it holds {_listed(stored)}. Give one that anomalib's training wrote."
        )
        raise ValueError(msg)
    try:
        return RDPP.load_from_checkpoint(path, map_location="cpu")
    except (RuntimeError, TypeError) as error:
        msg = f"'{path}' is an anomalib checkpoint of another model than RDPP, which alone has a published layout."
        raise ValueError(msg) from error


def save_checkpoint(model: RDPP, path: str | Path) -> None:
    """Write the anomalib checkpoint that ``anomalib train`` would have written, teacher included, without optimiser."""
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path, weights_only=False)  # True would leave the pre-processor's configuration out


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and convert; what is wrong with it or with the file is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m anomalib_rdpp.published",
        description="Turn published weights of RD or RD++ into an anomalib checkpoint, or back.",
        epilog="The written checkpoint has no thresholds: see help(anomalib_rdpp.load_published).",
    )
    parser.add_argument("checkpoint", type=Path, help="file of the official code; an RDPP checkpoint to go back")
    parser.add_argument("out", type=Path, help="file to write: .ckpt for anomalib, .pth for the official code")
    parser.add_argument("--to-published", action="store_true", help="go back, to the layout of the official code")
    parser.add_argument("--backbone", help="teacher of the file, by its timm name (default: wide_resnet50_2.tv_in1k)")
    parser.add_argument("--teacher-weights", help="file with the teacher's state dict, instead of a download")
    parser.add_argument("--no-pre-trained", action="store_true", help="leave the teacher random: for trials")
    parser.add_argument("--force", action="store_true", help="write over OUT if it exists")
    options = parser.parse_args(arguments)
    teacher = {"backbone": options.backbone, "teacher_weights": options.teacher_weights}
    teacher = {name: value for name, value in teacher.items() if value}
    if options.to_published and (teacher or options.no_pre_trained):
        parser.error("--to-published takes backbone and teacher from the checkpoint: leave those options out")
    if options.out.exists() and not options.force:
        parser.error(f"'{options.out}' exists: choose another name, or write over it with --force")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    part = options.out.with_name(f".{options.out.name}.{os.getpid()}.part")  # nobody ever sees half a file
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if options.to_published:
            model = load_checkpoint(options.checkpoint)
            torch.save(to_published(model), part)
        else:
            model = load_published(options.checkpoint, pre_trained=not options.no_pre_trained, **teacher)
            save_checkpoint(model, part)
        part.replace(options.out)
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    finally:
        part.unlink(missing_ok=True)
    projects, backbone = model.hparams.projection, model.hparams.backbone
    sys.stdout.write(f"Wrote {options.out}: {'RD++' if projects else 'RD'} with backbone {backbone}.\n")
    if not options.to_published:
        sys.stdout.write(
            f"To export it:\n  anomalib export --model RDPP --model.backbone {backbone} --model.pre_trained false"
            f"{'' if projects else ' --model.projection false'} --export_type openvino --ckpt_path {options.out}\n"
            "The published file has no thresholds: scores are raw (0 to 6), labels and masks mean nothing until "
            "Engine.validate has run on your data. AUROC and AUPRO need none.\n",
        )


def _read(path: str | Path) -> dict[str, Any]:
    """Load a file of plain tensors in dicts; never anything that could run code."""
    if not Path(path).is_file():
        msg = f"No file at '{path}': give the path of a checkpoint."
        raise FileNotFoundError(msg)
    try:
        stored = torch.load(path, "cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # What a foreign file makes torch raise has no end, and its text advises to load unsafely.
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it holds {found[1]}, and objects other than tensors can run code. Ask for a file of state dicts alone."
            if found
            else "it is damaged, incomplete or no PyTorch file of plain tensors. Fetch it again and compare its size."
        )
        msg = f"'{path}' was not loaded: {reason}"
        raise ValueError(msg) from error
    if not isinstance(stored, dict):
        msg = f"'{path}' holds a {type(stored).__name__}, not a dict of state dicts: give the checkpoint itself."
        raise ValueError(msg)  # noqa: TRY004  the file is wrong, not the caller's type
    return stored


def _parts(network: RDPPModel) -> dict[str, nn.Module]:
    """Parts of a network with the names that they and their weights have in published files."""
    parts: dict[str, nn.Module] = {"bn": network.student.bottleneck, "decoder": network.student.decoder}
    if network.is_projecting:
        pairs = zip(SCALES, network.projections, strict=True)
        parts["proj"] = nn.ModuleDict({f"proj_{letter}": nn.ModuleDict({"proj": part}) for letter, part in pairs})
    return parts


def _expected(name: str, projection: bool) -> dict[str, torch.Size]:
    """Shape of every entry of a published file, by part and name."""
    with torch.device("meta"):
        parts = _parts(RDPPModel(name, pre_trained=False, projection=projection))
    return {
        f"{part}.{key}": value.shape for part, network in parts.items() for key, value in network.state_dict().items()
    }


def _differences(stored: dict[str, Any], expected: dict[str, torch.Size]) -> list[str]:
    """Names of what is missing, of another shape or no tensor, or unknown.

    Counters of batches came later to torch than BatchNorm; ``memory`` is what RD's official code drops from its files.
    """
    wrong = [name for name in expected if name in stored and getattr(stored[name], "shape", None) != expected[name]]
    one_sided = [name for name in {**expected, **stored} if (name in stored) != (name in expected)]
    return wrong + [
        name
        for name in one_sided
        if not name.endswith("num_batches_tracked") and not (name in stored and "memory" in name)
    ]


def _listed(names: Iterable[object], limit: int = 4) -> str:
    """First names of many."""
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "") or "nothing"


if __name__ == "__main__":
    main()
