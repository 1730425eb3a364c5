"""Texture anomalies in the shape of Perlin noise, what AAND's amplifier learns from.

anomalib's generator makes shape and texture; what is added here is that they stay on the object, and a mask of exactly
the pixels that changed. Numbers from Tang et al., IEEE TIP 2026, stage one.
"""

from collections.abc import Sequence
from glob import escape
from pathlib import Path

import torch
from anomalib.data.utils import read_mask
from anomalib.data.utils.generators import PerlinAnomalyGenerator
from kornia.filters import gaussian_blur2d, otsu_threshold
from PIL import Image
from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import resize, rgb_to_grayscale

from anomalib_rdpp.teacher import check, check_choice, check_images

TEXTURES = {".jpg", ".jpeg", ".png"}
ATTEMPTS = 10  # to hit the foreground, anomalib's number for an empty shape


class TextureAnomalies(nn.Module):
    """Blend textures into some of the images, inside their foreground.

    All draws come from torch's generators, so that ``seed_everything`` rules them.

    Args:
        texture_dir: Folder of JPEG or PNG textures, searched to its depth; None for grey Perlin noise.
        foreground: ``none`` takes every pixel for foreground; ``estimate`` what stands out from the image's border.
        foreground_dir: Folder of masks instead, each with the stem of its image's file name and the size of its file.
        probability: Share of the images that get an anomaly.

    Raises:
        ValueError: If an argument is not admissible.

    Examples:
        >>> images, masks, foreground = TextureAnomalies(probability=1)(torch.rand(2, 3, 64, 64))
        >>> images.shape, masks.shape, foreground.shape
        (torch.Size([2, 3, 64, 64]), torch.Size([2, 1, 64, 64]), torch.Size([2, 1, 64, 64]))
    """

    def __init__(
        self,
        texture_dir: str | None = None,
        foreground: str = "none",
        foreground_dir: str | None = None,
        # The paper's "half of the images", anomalib's default too; the official code is said to take 80 %.
        probability: float = 0.5,
    ) -> None:
        super().__init__()
        check_choice("foreground", foreground, ("none", "estimate"))
        if foreground != "none" and foreground_dir is not None:
            msg = f"Foreground is either estimated or read from '{foreground_dir}': give foreground or foreground_dir."
            raise ValueError(msg)
        check(0 <= probability <= 1, "The share of images with an anomaly", "within 0 and 1", probability)
        self.generator = PerlinAnomalyGenerator()
        if texture_dir is not None:  # in an order that all machines share; anomalib leaves out upper-case suffixes
            files = sorted(Path(texture_dir).rglob("*"))
            self.generator.anomaly_source_paths = [path for path in files if path.suffix.lower() in TEXTURES]
        self.texture_dir = texture_dir
        self.foreground = foreground
        self.foreground_dir = foreground_dir
        self.probability = probability

    def check_folders(self) -> None:
        """Look for the folders before training: ``FileNotFoundError`` without one, ``ValueError`` without textures."""
        for name in ("texture_dir", "foreground_dir"):
            folder = getattr(self, name)
            if folder is not None and not Path(folder).is_dir():
                msg = f"{name} is no folder: '{folder}'. Give an existing one, or leave it out."
                raise FileNotFoundError(msg)
        if self.texture_dir is not None and not self.generator.anomaly_source_paths:
            msg = f"No texture images in '{self.texture_dir}': put JPEG or PNG files there, or leave texture_dir out."
            raise ValueError(msg)

    def forward(
        self, images: torch.Tensor, image_paths: Sequence[str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Blend anomalies into a batch.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1].
            image_paths: Their files, which masks in ``foreground_dir`` are found by.

        Returns:
            Images ``(B, 3, H, W)`` in [0, 1]; boolean masks ``(B, 1, H, W)`` of the pixels that changed and of the
            foreground.

        Raises:
            ValueError: If the images have not three channels, a texture can't be read, or a mask is missing, unreadable
                or of another size than its image.
        """
        check_images(images)
        with torch.autocast(images.device.type, enabled=False):
            foreground = self._find_foreground(images, image_paths)
            blended = torch.stack([self._blend(*pair) for pair in zip(images, foreground, strict=True)])
        return blended, (blended != images).any(dim=1, keepdim=True), foreground

    def _blend(self, image: torch.Tensor, foreground: torch.Tensor) -> torch.Tensor:
        """Return ``(3, H, W)`` with an anomaly on its foreground ``(1, H, W)``, or as it was."""
        if torch.rand(()) >= self.probability or not foreground.any():
            return image
        for _ in range(ATTEMPTS):
            texture, shape = self._draw_anomaly(image)
            inside = shape.bool() & foreground
            if inside.any():
                opacity = 0.2 + 0.8 * float(torch.rand(()))  # the paper's 1 - beta, beta uniform in [0, 0.8]
                blended = opacity * texture + (1 - opacity) * image
                return torch.where(inside, blended.clamp(0, 1), image).to(image)
        return image

    def _draw_anomaly(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Texture ``(3, H, W)`` and shape ``(1, H, W)``."""
        paths = self.generator.anomaly_source_paths
        path = None if self.texture_dir is None else paths[int(torch.randint(len(paths), ()))]
        try:
            anomaly = self.generator.generate_perturbation(*image.shape[1:], image.device, path)
        except RuntimeError as error:
            if path is None or isinstance(error, torch.OutOfMemoryError):
                raise
            msg = f"Texture '{path}' can't be read as JPEG or PNG; repair or remove it. ({error})"
            raise ValueError(msg) from error
        texture, shape = (part.permute(2, 0, 1) for part in anomaly)
        return texture, shape

    def _find_foreground(self, images: torch.Tensor, image_paths: Sequence[str] | None) -> torch.Tensor:
        """Boolean ``(B, 1, H, W)``."""
        if self.foreground_dir is not None:
            if image_paths is None:
                msg = "Masks in foreground_dir are found by image file, but the batch has no image paths."
                raise ValueError(msg)
            masks = [find_mask(Path(self.foreground_dir), Path(path)) for path in image_paths]
            size = list(images.shape[-2:])
            return torch.stack([resize(mask[None].float(), size) > 0.5 for mask in masks]).to(images.device)
        if self.foreground == "estimate":
            return estimate_foreground(images)
        return torch.ones_like(images[:, :1], dtype=torch.bool)


def estimate_foreground(images: torch.Tensor, sigma: float = 1 / 32) -> torch.Tensor:
    """Take for foreground what stands out from the border of a blurred grey image.

    One threshold per image (Otsu) where the official code has one per category. Meant for one object before an even
    background; a texture, or an object that fills the border, is better served by ``none``.

    Args:
        images: ``(B, 3, H, W)``.
        sigma: Of the blur, relative to the shorter side: the official code's 8 pixels of 256.

    Returns:
        Boolean ``(B, 1, H, W)``; all of it for an image without contrast.
    """
    sigma = sigma * min(images.shape[-2:])
    grey = gaussian_blur2d(rgb_to_grayscale(images.float()), 2 * int(3 * sigma) + 1, (sigma, sigma))
    bright = torch.stack([otsu_threshold(image[0], return_mask=True)[0] for image in grey])[:, None]
    border = torch.cat([bright[..., [0, -1], :].flatten(1), bright[..., [0, -1]].flatten(1)], dim=1)
    is_bright_background = border.float().mean(dim=1) > 0.5
    foreground = bright ^ is_bright_background[:, None, None, None]
    return foreground | ~foreground.any(dim=(1, 2, 3), keepdim=True)


def find_mask(folder: Path, image_path: Path) -> torch.Tensor:
    """Read an image's mask: boolean ``(H, W)``, set where the file isn't black.

    Raises:
        ValueError: If there is none, it can't be read, or it has not the size of the image's file.
    """
    found = sorted(
        path for path in folder.glob(f"{escape(image_path.stem)}.*") if path.suffix.lower() in IMG_EXTENSIONS
    )
    if not found:
        msg = f"No foreground mask for '{image_path}': expected '{folder / image_path.stem}.png' or another image type."
        raise ValueError(msg)
    try:
        mask = read_mask(found[0], as_tensor=True).bool()
    except OSError as error:
        msg = f"Foreground mask '{found[0]}' can't be read; repair or replace it. ({error})"
        raise ValueError(msg) from error
    with Image.open(image_path) as image:
        width, height = image.size
    if mask.shape != (height, width):
        msg = (
            f"Foreground mask '{found[0]}' has {mask.shape[0]} x {mask.shape[1]} pixels (height x width), its image "
            f"{height} x {width}; masks need the size of their image's file, both are resized alike afterwards."
        )
        raise ValueError(msg)
    return mask
