"""Pixels in [0, 1]: files that anomalib's reader would flatten, and transforms that would normalise.

anomalib reads every file by Pillow as RGB with 8 bits. What has more bits than that becomes black or white, without a
word; here it is read right if its range is known, and refused by name if not.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from copy import copy
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any
from unittest import mock

import numpy as np
import torch
from anomalib.data import ImageItem
from anomalib.data.datasets import AnomalibDataset
from anomalib.data.utils import image as anomalib_image
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.transforms.v2.functional import to_image

MOST_KEPT = 2**30  # bytes of images and masks
SLACK = 0.05  # beyond [0, 1]: what an even image may come to in a transform
CONVERTIBLE = {"1", "L", "P", "RGB", "RGBX", "YCbCr", "LAB", "HSV"}  # Pillow's modes that look the same as RGB
FIXED = {"Resize", "CenterCrop", "Compose", "Sequential", "Identity"}  # transforms that draw no numbers
ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}
EIGHT_BITS, SIXTEEN_BITS, TURNED = "8 bits", "16 bits", "8 bits, turned by EXIF"
ORIENTATION, BITS, WHITE_IS_0, PLANES, SAMPLE_FORMAT = 274, 258, 262, 284, 339  # tags of EXIF and TIFF


def read_image(path: str | Path, as_tensor: bool = False) -> torch.Tensor | np.ndarray:
    """Read an image as anomalib does, but 16 bits by their range, and floating point that is in [0, 1] already.

    Args:
        path: The file.
        as_tensor: Give a tensor ``(3, H, W)`` and no array ``(H, W, 3)``.

    Raises:
        ValueError: If what the pixels mean isn't known, or the file is cut off; names the file.
    """
    try:
        return _read(path, as_tensor)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError) as error:  # as Pillow says it
        raise _refusal(path, f"is damaged ({error})") from error


def _read(path: str | Path, as_tensor: bool) -> torch.Tensor | np.ndarray:
    """Read a file whose kind is known."""
    kind = pixel_kind(path)
    if kind in {EIGHT_BITS, TURNED}:
        return anomalib_image.read_image(path, as_tensor)
    with Image.open(path) as image:
        if kind == "alpha":
            if _is_transparent(image):
                raise _refusal(path, "has transparent pixels, and what is behind them isn't known")
            return anomalib_image.read_image(path, as_tensor)
        grey, tags = np.asarray(image, np.float32), getattr(image, "tag_v2", {})
    if kind == SIXTEEN_BITS:
        grey = grey / (2 ** tags.get(BITS, [16])[0] - 1)  # 12 in files of some cameras
    elif not 0 <= grey.min() <= grey.max() <= 1:
        raise _refusal(path, f"holds floating point from {grey.min():g} to {grey.max():g}, not within [0, 1]")
    grey = 1 - grey if tags.get(WHITE_IS_0) == 0 else grey
    rgb = np.repeat(grey[..., None], 3, axis=2)
    return to_image(rgb) if as_tensor else rgb


def read_right(dataset: Dataset) -> None:
    """Let a dataset of anomalib read by ``read_image``; what is turned or has 16 bits is said.

    An image or a mask that can't be read right is refused by ``ValueError``, which names it.
    """
    paths = dataset.samples["image_path"] if hasattr(dataset, "samples") else getattr(dataset, "image_filenames", ())
    files = filter(anomalib_image.is_image_file, paths)  # others are videos
    kinds = {str(path): pixel_kind(path) for path in files}
    if kinds and not hasattr(dataset, "reads_right"):
        dataset.__class__ = _reading_right(type(dataset))
        if deep := [path for path, kind in kinds.items() if kind == SIXTEEN_BITS]:
            rank_zero_info(f"{len(deep)} images have 16 bits and are read as value / range, the first is '{deep[0]}'.")
        if turned := [path for path, kind in kinds.items() if kind == TURNED]:
            rank_zero_warn(
                f"{len(turned)} images are marked as turned (EXIF), the first is '{turned[0]}': anomalib reads pixels "
                "as they are stored, while viewers and OpenCV turn them. Masks and the images on the box must agree."
            )
        masks = dataset.samples["mask_path"] if "mask_path" in getattr(dataset, "samples", ()) else ()
        jpegs = []
        for path in sorted({str(mask) for mask in masks if isinstance(mask, str | Path) and Path(mask).is_file()}):
            with Image.open(path) as mask:
                if mask.mode == "F" or _is_transparent(mask):
                    raise _refusal(path, "is a mask with transparent or floating-point pixels, of unknown meaning")
                jpegs += [path] if mask.format == "JPEG" else []
        if jpegs:
            rank_zero_warn(
                f"{len(jpegs)} masks are JPEGs, whose grey edges count as defect, the first is '{jpegs[0]}': save PNGs."
            )


def datasets(trainer: Trainer) -> Iterator[tuple[str, Dataset]]:
    """Find what a trainer is about to read, by name: its datamodule's datasets, and those of loaders given to it."""
    for name in ("train", "val", "test"):
        if (dataset := getattr(trainer.datamodule, f"{name}_data", None)) is not None:
            yield name, dataset
    loops = (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop)
    for loop in (*loops, trainer.predict_loop):
        given = loop._data_source.instance  # noqa: SLF001  not public before iteration, which would be too late
        for loader in given if isinstance(given, list | tuple) else [given]:
            if isinstance(loader, DataLoader):
                yield "given", loader.dataset


def transforms_in(root: object) -> Iterator[object]:
    """Give a transform and all that it calls, in containers, attributes, partial functions and closures."""
    found, seen = [root], set()
    while found:
        each = found.pop()
        if id(each) in seen or isinstance(each, type | torch.Tensor):
            continue
        seen.add(id(each))
        if isinstance(each, dict):
            found += each.values()
        elif isinstance(each, list | tuple | set):
            found += each
        elif callable(each):
            yield each
            found += [cell.cell_contents for cell in getattr(each, "__closure__", None) or ()]
            found += [getattr(each, name, None) for name in ("func", "args", "keywords", "__self__")]
            found += [] if isinstance(each, FunctionType) else getattr(each, "__dict__", {}).values()


def is_fixed(transform: object) -> bool:
    """Whether a transform, of torch or torchvision, surely makes the same pixels of an image each time."""
    kinds = [type(each) for each in transforms_in(transform)]
    return all(kind.__name__ in FIXED and kind.__module__.startswith(("torch.", "torchvision.")) for kind in kinds)


def refuse_normalize(transform: object, where: str) -> None:
    """Refuse by ``ValueError`` what normalises, by its name or by what black and white images become."""
    names = (getattr(each, "__name__", type(each).__name__) for each in transforms_in(transform))
    is_normalizing = any(name.lower() == "normalize" for name in names)
    halves = torch.linspace(0, 1, 256).round().expand(3, 256, 256)  # what subtracts a mean leaves even images in [0, 1]
    for given in (
        () if transform is None or is_normalizing else (torch.zeros(3, 256, 256), torch.ones(3, 256, 256), halves)
    ):
        # What a transform can't do with such an image, the training will tell.
        with torch.random.fork_rng(devices=[]), suppress(Exception):
            low, high = transform(to_image(given)).flatten()[::7].double().quantile(torch.tensor([0.25, 0.75]).double())
            is_normalizing |= not -SLACK <= low <= high <= 1 + SLACK
    if is_normalizing:
        msg = (
            f"{where} contains Normalize or leaves [0, 1], but the model normalises by itself and adds its synthetic "
            "anomalies to pixels in [0, 1]; take Normalize out of the transform."
        )
        raise ValueError(msg)


def refuse_moving(transform: object, where: str) -> None:
    """Refuse by ``ValueError`` what may move pixels otherwise than by a resize, which masks of files can't follow."""
    still = ("_color", "_container", "_misc", "_type_conversion", "_utils")
    for each in transforms_in(transform):
        name, place = type(each).__name__, type(each).__module__
        is_still = place.startswith("torchvision.transforms.v2.") and place.endswith(still) and name != "Lambda"
        if not is_still and name not in {"Resize", "Sequential"}:
            msg = (
                f"{where} contains {name}, which may move pixels, and the masks of foreground_dir wouldn't follow: "
                'take it out, or give foreground="estimate" in the place of foreground_dir.'
            )
            raise ValueError(msg)


@cache
def pixel_kind(path: str | Path) -> str:
    """What a file's header tells of its pixels; if that isn't known, a ``ValueError`` names the file."""
    try:
        with Image.open(path) as image:
            if image.format in {"TIFF", "WEBP"} and image.n_frames > 1:
                raise _refusal(path, f"holds {image.n_frames} pages, of which only the first would be read")
            is_deep, tags = image.mode.startswith("I;16"), getattr(image, "tag_v2", {})
            if is_deep and "transparency" in image.info:
                raise _refusal(path, "has transparent pixels, and what is behind them isn't known")
            is_signed = 2 in tags.get(SAMPLE_FORMAT, ()) and image.mode in CONVERTIBLE
            if is_signed or (tags.get(PLANES) == 2 and max(tags.get(BITS, [8])) > 8):
                raise _refusal(path, "holds separate planes of more than 8 bits, or numbers with a sign")
            if image.mode in ALPHA or "transparency" in image.info:
                return "alpha"
            if image.mode in CONVERTIBLE:
                is_turned = image.format in {"JPEG", "MPO"} and image.getexif().get(ORIENTATION, 1) > 1
                return TURNED if is_turned else EIGHT_BITS
            if is_deep or (image.mode == "I" and image.format == "PPM"):
                return SIXTEEN_BITS
            if image.mode == "F":
                return "float"
            raise _refusal(path, f"has pixels of Pillow's mode '{image.mode}', whose range or colours aren't known")
    except UnidentifiedImageError as error:
        raise _refusal(path, "is damaged, or holds pixels that Pillow doesn't know") from error


def _refusal(path: str | Path, reason: str) -> ValueError:
    """Say what to do."""
    return ValueError(f"'{path}' {reason}: save it as 8 or 16 bit grey, or 8 bit RGB, PNG or TIFF, one image per file.")


def _is_transparent(image: Image.Image) -> bool:
    """Whether any pixel of an image is not wholly opaque."""
    has_alpha = image.mode in ALPHA or "transparency" in image.info
    return has_alpha and image.convert("RGBA").getchannel("A").getextrema()[0] < 255


@cache
def _reading_right(base: type[Dataset]) -> type[Dataset]:
    """Make the class that differs from a dataset's in its reader alone.

    Where ``kept_items`` is a dict, a process that is no worker reads an image once, as far as ``MOST_KEPT`` goes.
    """
    modules = [module for each in base.__mro__ if hasattr(module := sys.modules[each.__module__], "read_image")]

    def get_item(self: Any, index: int) -> object:  # noqa: ANN401  a mixin of the class made below
        known = (self.kept_items or {}).get(index)
        if known and known[0] is self.augmentations and known[1] is self.samples:
            return _clone(known[2])
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(mock.patch.object(module, "read_image", read_image))
            item = base.__getitem__(self, index)
        is_kept = self.kept_items is not None and base.__getitem__ is AnomalibDataset.__getitem__
        if is_kept and not get_worker_info():
            nbytes = sum(part.nbytes for part in (item.image, item.gt_mask) if part is not None)
            if (len(self.kept_items) + 1) * nbytes <= MOST_KEPT:
                self.kept_items[index] = self.augmentations, self.samples, _clone(item)
        return item

    members = {
        "__getitem__": get_item,
        "__reduce__": lambda self: (_restore, (base, {**self.__dict__, "kept_items": None})),
        "reads_right": True,
        "kept_items": None,
    }
    return type(base.__name__, (base,), members)


def _clone(item: ImageItem) -> ImageItem:
    """Copy an item with its pixels, which others may change, or which may be a part of larger ones."""
    copied = copy(item)
    copied.image = item.image.clone()
    copied.gt_mask = None if item.gt_mask is None else item.gt_mask.clone()
    return copied


def _restore(base: type[Dataset], attributes: dict[str, object]) -> Dataset:
    """Unpickle in a worker process."""
    dataset = object.__new__(_reading_right(base))
    dataset.__dict__.update(attributes)
    return dataset
