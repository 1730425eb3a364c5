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
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from anomalib_rdpp.rdpp.lightning_model import RDPP
from anomalib_rdpp.rdpp.torch_model import RDPPModel
from anomalib_rdpp.student import PAPER, SCALES
from anomalib_rdpp.teacher import architecture, read_tensors


def load_published(
    path: str | Path,
    backbone: str = "wide_resnet50_2.tv_in1k",
    pre_trained: bool = True,
    teacher_weights: str | None = None,
) -> RDPP:
    """Load a file of RD++'s or RD's official code; the model is in training mode: call ``eval()`` to use it by hand.

    The file has no thresholds: until ``Engine.validate`` has found them on your data, scores and maps are the raw ones,
    from 0 to 6, compared with 0.5: labels, masks and F1 mean nothing; AUROC and AUPRO need none. ``anomalib validate``
    keeps nothing; in Python, what follows has thresholds::

        engine.validate(model, datamodule=data)
        engine.export(model, "openvino")
        engine.trainer.save_checkpoint("model.ckpt")

    Args:
        path: The file. With ``proj`` it is RD++, without it RD, a model without projection.
        backbone: timm name of the teacher that the file was trained with. Without tag, and if ImageNet weights are
            fetched, it is torchvision's first set (``tv_in1k``), the authors' own, and not timm's default.
        pre_trained: Whether the teacher takes ImageNet weights, from timm's cache or by download.
        teacher_weights: File with the teacher's state dict (.pt, .pth, .safetensors), instead of a download.

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
    projection = any(name.startswith("proj.") for name in weights)
    if pre_trained and teacher_weights is None and "." not in backbone:
        backbone = f"{backbone}.tv_in1k"
    model = RDPP(backbone, pre_trained, teacher_weights, projection=projection, score="max")  # the official code's
    _parts(model.model).load_state_dict(weights)
    return model


def to_published(model: RDPP) -> dict[str, dict[str, torch.Tensor]]:
    """Give copies of a model's weights in the published layout: no teacher, no thresholds, no hyper-parameters.

    Args:
        model: RD++, or RD, that is ``RDPP(projection=False)``.

    Raises:
        ValueError: If student or projection are not the papers', whole.
    """
    student, is_light = model.model.student, model.hparams.projection == "light"
    is_whole = model.hparams.bottleneck == "mff+oce" and student.scales == SCALES
    if type(student).__name__ != "Student" or is_light or not is_whole:
        msg = "The published layout holds the papers' student and projection alone; this model's are light or ablated."
        raise ValueError(msg)
    return {
        part: {name: value.cpu().clone() for name, value in network.state_dict().items()}
        for part, network in _parts(model.model).items()
    }


def read_published(path: str | Path, backbone: str) -> dict[str, torch.Tensor]:
    """Read exactly the tensors of the layout, every name, shape and number checked; errors as of ``load_published``.

    Leftovers named ``memory`` are dropped, missing counters of batches are 0, DataParallel's ``module.`` is stripped.
    """
    parts = read_tensors(path)
    if parts.keys() - {"proj"} != {"bn", "decoder"} or not all(isinstance(values, dict) for values in parts.values()):
        msg = (
            f"'{path}' holds {_listed(parts)}; expected the state dicts bn and decoder (RD), or bn, decoder and proj "
            "(RD++). Give a file that the official code wrote; a checkpoint of anomalib needs no conversion."
        )
        raise ValueError(msg)
    if architecture(backbone) not in PAPER:
        msg = f"No published file has backbone '{backbone}'; choose one of {', '.join(PAPER)}, with or without tag."
        raise ValueError(msg)
    stored = {
        f"{part}.{str(name).removeprefix('module.')}": value
        for part, values in parts.items()
        for name, value in values.items()
        if "memory" not in str(name)
    }
    layout = _layout(architecture(backbone), "proj" in parts)
    if wrong := _differences(stored, layout):
        fitting = [name for name in PAPER if not _differences(stored, _layout(name, "proj" in parts))]
        advice = f"It fits {fitting[0]}: name that backbone." if fitting else "No other backbone fits it either."
        msg = (
            f"'{path}' doesn't fit backbone '{backbone}': {len(wrong)} entries are missing, unknown or of another "
            f"shape ({_listed(wrong)}). {advice}"
        )
        raise ValueError(msg)
    weights = {name: stored.get(name, torch.tensor(0)) for name in layout}
    if broken := [name for name, value in weights.items() if not value.isfinite().all()]:
        msg = (
            f"'{path}' holds NaN or infinite numbers in {len(broken)} entries ({_listed(broken)}): its training "
            "diverged or the file is damaged. Take an earlier file, or fetch it again."
        )
        raise ValueError(msg)
    return weights


def load_checkpoint(path: str | Path) -> RDPP:
    """Load an anomalib checkpoint of ``RDPP``; what is wrong with another file is a ``ValueError``."""
    stored = read_tensors(path)
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
        argument_default=argparse.SUPPRESS,
        description="Turn published weights of RD or RD++ into an anomalib checkpoint, or back.",
        epilog="The written checkpoint has no thresholds: see help(anomalib_rdpp.load_published).",
    )
    parser.add_argument("checkpoint", type=Path, help="file of the official code; an RDPP checkpoint to go back")
    parser.add_argument("out", type=Path, help="file to write: .ckpt for anomalib, .pth for the official code")
    parser.add_argument("--to-published", action="store_true", help="go back, to the layout of the official code")
    parser.add_argument("--backbone", help="teacher of the file, by its timm name (default: wide_resnet50_2.tv_in1k)")
    parser.add_argument("--teacher-weights", help="file with the teacher's state dict, instead of a download")
    parser.add_argument(
        "--no-pre-trained", dest="pre_trained", action="store_false", help="leave the teacher random: for trials"
    )
    parser.add_argument("--force", action="store_true", help="write over OUT if it exists")
    options = vars(parser.parse_args(arguments))  # what is left in it at last is for load_published
    path, out = options.pop("checkpoint"), options.pop("out")
    back, force = options.pop("to_published", False), options.pop("force", False)
    if back and options:
        parser.error("--to-published takes backbone and teacher from the checkpoint: leave those options out")
    if out.exists() and not force:
        parser.error(f"'{out}' exists: choose another name, or write over it with --force")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        model = load_checkpoint(path) if back else load_published(path, **options)
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=".part-") as folder:  # nobody ever sees half a file
            part = Path(folder, out.name)
            if back:
                torch.save(to_published(model), part)
            else:
                save_checkpoint(model, part)
            part.replace(out)
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    projects, backbone = model.hparams.projection, model.hparams.backbone
    sys.stdout.write(f"Wrote {out}: {'RD++' if projects else 'RD'} with backbone {backbone}.\n")
    if not back:
        sys.stdout.write(
            f"To export it:\n  anomalib export --model RDPP --model.backbone {backbone} --model.pre_trained false"
            f"{'' if projects else ' --model.projection false'} --export_type openvino --ckpt_path {out}\n"
            "The published file has no thresholds: scores are raw (0 to 6), labels and masks mean nothing until "
            "Engine.validate has run on your data. AUROC and AUPRO need none.\n"
        )


def _parts(network: RDPPModel) -> nn.ModuleDict:
    """Parts of a network with the names that they and their weights have in published files."""
    parts = nn.ModuleDict({"bn": network.student.bottleneck, "decoder": network.student.decoder})
    if network.is_projecting:
        pairs = zip("abc", network.projections, strict=True)  # how the official code names them, fine to coarse
        parts["proj"] = nn.ModuleDict({f"proj_{letter}": nn.ModuleDict({"proj": part}) for letter, part in pairs})
    return parts


@lru_cache
def _layout(name: str, projection: bool) -> dict[str, torch.Size]:
    """Shape of every entry of a published file, by part and name."""
    with torch.device("meta"):
        parts = _parts(RDPPModel(name, pre_trained=False, projection=projection))
    return {key: value.shape for key, value in parts.state_dict().items()}


def _differences(stored: dict[str, Any], layout: dict[str, torch.Size]) -> list[str]:
    """Names of what is missing, unknown, of another shape or no tensor; counters of batches need not be there."""
    return [
        name
        for name in {**layout, **stored}
        if (name not in layout or getattr(stored.get(name), "shape", None) != layout[name])
        and (name in layout.keys() & stored.keys() or not name.endswith("num_batches_tracked"))
    ]


def _listed(names: Iterable[object], limit: int = 4) -> str:
    """First names of many."""
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "") or "nothing"


if __name__ == "__main__":
    main()
