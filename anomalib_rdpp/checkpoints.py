"""Published weights of RD and RD++, in and out.

The authors' programs save the state dicts of what they train: ``bn``, ``decoder`` and, in RD++, ``proj``. Bottleneck
and decoder have the host's names there; the projections are ``proj_a``, ``proj_b``, ``proj_c``, fine to coarse. No file
holds the teacher, which is torchvision's first ImageNet network (``tv_in1k``) for all of them.

Source: files of the published programs of RD (Deng & Li, CVPR 2022) and RD++ (Tien et al., CVPR 2023), both MIT.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from anomalib_rdpp.rdpp.lightning_model import RDPP
from anomalib_rdpp.rdpp.torch_model import Projection
from anomalib_rdpp.student import Student
from anomalib_rdpp.teacher import CHANNELS, architecture

SCALES = "abc"  # how the program names its projections, fine to coarse
PARTS = ({"bn", "decoder"}, {"bn", "decoder", "proj"})  # of RD, of RD++
PUBLISHED_TAG = "tv_in1k"

Weights = dict[str, dict[str, torch.Tensor]]


def load_published(
    path: str | Path,
    backbone: str = f"wide_resnet50_2.{PUBLISHED_TAG}",
    pre_trained: bool = True,
    teacher_weights: str | None = None,
) -> RDPP:
    """Load a file of the published RD++ or RD program.

    The file has no thresholds. Until ``Engine.validate`` has found them on your data, scores and maps are the raw ones,
    from 0 to 6, and the host's post-processor compares them with 0.5: labels, masks and F1 mean nothing yet, while
    AUROC and AUPRO need no threshold. ``anomalib validate`` keeps nothing; in Python, what follows has thresholds::

        engine.validate(model, datamodule=data)
        engine.export(model, "openvino")
        engine.trainer.save_checkpoint("model.ckpt")

    Args:
        path: The file. With ``proj`` it is RD++, without it RD, a model without projection.
        backbone: timm name of the teacher that the file was trained with. Without tag, and if ImageNet weights are
            fetched, it is torchvision's first set (``tv_in1k``), the programs' own, and not timm's default.
        pre_trained: Whether the teacher takes ImageNet weights, from timm's cache or by download.
        teacher_weights: File with the teacher's state dict (.pt, .pth, .safetensors), instead of a download.

    Returns:
        The model, in training mode as if newly built: call ``eval()`` before you call it by hand.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it can't be loaded safely, is damaged, is of another program or of another backbone.

    Examples:
        >>> from tempfile import mkdtemp
        >>> path = f"{mkdtemp()}/published.pth"
        >>> torch.save(to_published(RDPP("resnet18", pre_trained=False)), path)
        >>> model = load_published(path, "resnet18", pre_trained=False).eval()
        >>> model(torch.rand(1, 3, 256, 256)).anomaly_map.shape
        torch.Size([1, 1, 256, 256])
    """
    weights = read_published(path, backbone)  # before the teacher, which may have to be fetched
    if pre_trained and teacher_weights is None and "." not in backbone:
        backbone = f"{backbone}.{PUBLISHED_TAG}"
    model = RDPP(backbone, pre_trained=pre_trained, teacher_weights=teacher_weights, projection="proj" in weights)
    model.model.student.bottleneck.load_state_dict(weights["bn"])
    model.model.student.decoder.load_state_dict(weights["decoder"])
    if model.model.is_projecting:
        for letter, projection in zip(SCALES, model.model.projections, strict=True):
            prefix = f"proj_{letter}.proj."
            projection.load_state_dict({name: weights["proj"][prefix + name] for name in projection.state_dict()})
    return model


def to_published(model: RDPP) -> Weights:
    """Give a model's weights in the published layout, ready for ``torch.save`` and for the authors' programs.

    What they don't keep is not in it: teacher, thresholds, hyper-parameters.

    Args:
        model: RD++, or RD, that is ``RDPP(projection=False)``.

    Returns:
        Copies on the CPU.
    """
    network = model.model
    weights = _published(network.student, network.projections if network.is_projecting else ())
    return {part: {name: value.cpu().clone() for name, value in values.items()} for part, values in weights.items()}


def read_published(path: str | Path, backbone: str) -> Weights:
    """Read a published file and check every name and shape, without building a network.

    Args:
        path: The file.
        backbone: timm name of the teacher.

    Returns:
        Exactly the tensors of the layout. ``memory`` entries, left over in some files, are dropped; counters of
        BatchNorm batches, absent from some, are 0.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it can't be loaded safely, is damaged, is of another program or of another backbone.
    """
    stored = _read(path)
    if set(stored) not in PARTS or not all(isinstance(values, dict) for values in stored.values()):
        msg = (
            f"'{path}' holds {_listed(stored)}; expected the state dicts bn and decoder (RD), or bn, decoder and proj "
            "(RD++). Give a file that one of these programs wrote; a checkpoint of anomalib needs no conversion."
        )
        raise ValueError(msg)
    expected = _expected(architecture(backbone), "proj" in stored)
    if wrong := _differences(stored, expected):
        fitting = [name for name in CHANNELS if not _differences(stored, _expected(name, "proj" in stored))]
        advice = f"It fits {fitting[0]}: name that backbone." if fitting else "No other backbone fits it either."
        msg = (
            f"'{path}' doesn't fit backbone '{backbone}': {len(wrong)} entries are missing, unknown or of another "
            f"shape ({_listed(wrong)}). {advice}"
        )
        raise ValueError(msg)
    return {
        part: {name: stored[part].get(name, torch.zeros(shape, dtype=torch.long)) for name, shape in shapes.items()}
        for part, shapes in expected.items()
    }


def load_checkpoint(path: str | Path) -> RDPP:
    """Load an anomalib checkpoint of ``RDPP``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it can't be loaded safely, is damaged or is no such checkpoint.
    """
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


def _published(student: Student, projections: Iterable[Projection]) -> Weights:
    """Name the weights as the published programs do."""
    projected = {
        f"proj_{letter}.proj.{name}": value
        for letter, projection in zip(SCALES, projections, strict=False)
        for name, value in projection.state_dict().items()
    }
    parts = {"bn": student.bottleneck.state_dict(), "decoder": student.decoder.state_dict()}
    return {**parts, "proj": projected} if projected else parts


def _expected(name: str, projection: bool) -> dict[str, dict[str, torch.Size]]:
    """Shape of every entry of a published file, by its part and name."""
    with torch.device("meta"):
        weights = _published(Student(name), map(Projection, CHANNELS[name]) if projection else ())
    return {part: {name: value.shape for name, value in values.items()} for part, values in weights.items()}


def _differences(stored: dict[str, dict[str, Any]], expected: dict[str, dict[str, torch.Size]]) -> list[str]:
    """Names of what is missing, of another shape or no tensor, or unknown."""
    return [
        f"{part}.{name}"
        for part, shapes in expected.items()
        for name in {**shapes, **stored[part]}
        if not _is_right(stored[part], shapes, name) and not _is_ignored(stored[part], shapes, name)
    ]


def _is_right(stored: dict[str, Any], shapes: dict[str, torch.Size], name: str) -> bool:
    """Whether an entry is expected and there, with its shape."""
    return name in shapes and isinstance(stored.get(name), torch.Tensor) and stored[name].shape == shapes[name]


def _is_ignored(stored: dict[str, Any], shapes: dict[str, torch.Size], name: str) -> bool:
    """Whether an entry may be absent, or there without need.

    Counters of batches came later to torch than BatchNorm; ``memory`` is what RD's program drops from its own files.
    """
    is_one_sided = (name in stored) != (name in shapes)
    return is_one_sided and (str(name).endswith("num_batches_tracked") or (name in stored and "memory" in str(name)))


def _listed(names: Iterable[object], limit: int = 4) -> str:
    """First names of many."""
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "") or "nothing"
