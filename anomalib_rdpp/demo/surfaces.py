"""Photographs of woven cloth, faultless and with defects, drawn from a seed.

A plain weave of two yarns under uneven light. No two images share phase, angle, thread thickness or lighting, so that a
defect is a deviation from the texture and not from a picture. The mask is what the defect changed visibly.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from anomalib.data import Folder
from PIL import Image
from scipy.ndimage import binary_closing, gaussian_filter, map_coordinates

WARP, WEFT, GROUND = np.array([[0.60, 0.57, 0.53], [0.47, 0.51, 0.56], [0.10, 0.09, 0.09]])  # RGB
THREADS = 24  # across the image
VISIBLE = 0.04  # change of a pixel, in units of [0, 1], from which the mask takes it


def make_surfaces(
    root: Path,
    *,
    train: int = 60,
    good: int = 30,
    defective: int = 30,
    size: int = 128,
    seed: int = 0,
) -> None:
    """Write a data set in the layout of ``anomalib.data.Folder``: train/good, test/<kind>, ground_truth/<defect>.

    Args:
        root: Folder to write into.
        train: Faultless training images.
        good: Faultless test images.
        defective: Defective test images, dealt out to the kinds of ``DEFECTS`` in turn.
        size: Side of the images in pixels.
        seed: Which data set; the same seed gives the same bytes.

    Raises:
        ValueError: If a number is too small.
    """
    if train < 1 or good < 1 or defective < len(DEFECTS) or size < 64:
        msg = (
            f"A data set needs 1 or more training and good images, {len(DEFECTS)} or more defective ones and 64 or "
            f"more pixels a side, got train={train}, good={good}, defective={defective}, size={size}."
        )
        raise ValueError(msg)
    for part, count in (("train", train), ("test", good)):
        for number in range(count):
            image, _ = photograph(np.random.default_rng([seed, len(part), number]), size)
            _save(image, root / part / "good" / f"{number:03}.png")
    for number in range(defective):
        defect = list(DEFECTS)[number % len(DEFECTS)]
        image, mask = photograph(np.random.default_rng([seed, 0, number]), size, defect)
        _save(image, root / "test" / defect / f"{number:03}.png")
        _save(mask, root / "ground_truth" / defect / f"{number:03}.png")


def read_surfaces(root: Path, seed: int = 0) -> Folder:
    """Read a data set that ``make_surfaces`` wrote.

    A third of the test images, chosen by the seed, sets the thresholds and is left out of the metrics.
    """
    return Folder(
        name="cloth",
        root=root,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir=[f"test/{defect}" for defect in DEFECTS],
        mask_dir=[f"ground_truth/{defect}" for defect in DEFECTS],
        train_batch_size=8,
        eval_batch_size=8,
        num_workers=0,
        val_split_mode="from_test",
        val_split_ratio=1 / 3,
        seed=seed,
    )


def photograph(generator: np.random.Generator, size: int, defect: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image.

    Returns:
        Image ``(size, size, 3)`` and mask ``(size, size)``, 0 or 255, both uint8.
    """
    cloth = Cloth.draw(generator, size)
    light = 1 + 0.03 * _clouds(generator, size, size / 2)[..., None] + generator.normal(0, 0.02)
    grain = generator.normal(0, 0.012, (size, size, 3))
    faultless = cloth.weave()
    damaged = DEFECTS[defect](generator, cloth, faultless) if defect else faultless
    before, after = (
        np.clip(gaussian_filter(cloths, (0.6, 0.6, 0)) * light + grain, 0, 1) for cloths in (faultless, damaged)
    )
    changed = np.abs(after - before).max(axis=-1) > VISIBLE
    closed = changed | binary_closing(changed, np.ones((5, 5)))  # threads of one defect are one region
    return np.rint(after * 255).astype(np.uint8), closed.astype(np.uint8) * 255


@dataclass
class Cloth:
    """Where the threads run. Warp threads go down the image, weft threads across; both are counted by ``floor``.

    Attributes:
        across: Position across the warp threads, in threads, ``(size, size)``.
        along: Position across the weft threads, likewise.
        thickness: Of each thread, relative to the space it has, ``(2, many)``.
        shade: Brightness of each thread, ``(2, many)``.
        fibre: Fine irregularity of the yarn, ``(2, size, size)``.
    """

    across: np.ndarray
    along: np.ndarray
    thickness: np.ndarray
    shade: np.ndarray
    fibre: np.ndarray

    @classmethod
    def draw(cls, generator: np.random.Generator, size: int) -> "Cloth":
        """Draw a cloth with its own angle, phase, tension and yarn."""
        rows, columns = np.mgrid[:size, :size] * (THREADS / size * generator.uniform(0.985, 1.015))
        angle = generator.normal(0, 0.015)
        phase = generator.uniform(10, 20, 2)
        tension = [0.06 * _clouds(generator, size, size / 5) for _ in range(2)]
        across = columns * np.cos(angle) + rows * np.sin(angle) + phase[0] + tension[0]
        along = rows * np.cos(angle) - columns * np.sin(angle) + phase[1] + tension[1]
        thickness = np.clip(generator.normal(0.92, 0.03, (2, 64)), 0.8, 1.0)
        shade = generator.normal(1, 0.02, (2, 64))
        noise = generator.normal(0, 1, (2, 256, 256))
        fibre = np.stack(
            [
                map_coordinates(noise[0], [across * 6, along * 1.5], order=1, mode="grid-wrap"),
                map_coordinates(noise[1], [across * 1.5, along * 6], order=1, mode="grid-wrap"),
            ],
        )
        return cls(across, along, thickness, shade, fibre)

    def weave(self, missing: np.ndarray | None = None) -> np.ndarray:
        """Render ``(size, size, 3)``; no weft thread where ``missing``, ``(size, size)``, is true."""
        threads = [np.floor(self.across).astype(int), np.floor(self.along).astype(int)]
        aside = [self.across % 1 - 0.5, self.along % 1 - 0.5]  # from the thread's middle, in threads
        over = np.where(sum(threads) % 2, 1.0, -1.0)  # which of the two is above
        colour, height = [], []
        for kind, (yarn, side) in enumerate(((WARP, over), (WEFT, -over))):
            thickness = self.thickness[kind][threads[kind]]
            round_ = np.sqrt(np.clip(1 - (2 * aside[kind] / thickness) ** 2, 0, 1))
            lift = 0.5 * side * np.cos(np.pi * aside[1 - kind])
            if missing is not None:
                lift = np.where(missing, 0.1 - kind, lift)  # without the other thread the warp lies flat
            twist = np.sin(2 * np.pi * (2.5 * (self.along, self.across)[kind] + 1.2 * aside[kind]))
            bright = self.shade[kind][threads[kind]] * (1 + 0.06 * self.fibre[kind] + 0.07 * twist)
            shape = bright * (0.35 + 0.65 * round_) * (0.82 + 0.36 * lift)
            colour.append(np.where(round_[..., None] > 0, yarn * shape[..., None], GROUND))
            height.append(np.where(round_ > 0, round_ + lift, -1))
        if missing is not None:
            height[1] = np.where(missing, -2, height[1])
        return np.where((height[0] > height[1])[..., None], *colour)


def _missing_thread(generator: np.random.Generator, cloth: Cloth, faultless: np.ndarray) -> np.ndarray:
    """Leave out four neighbouring weft threads over a third to two thirds of the width."""
    row, column = _place(generator, len(faultless))
    half = generator.uniform(0.17, 0.33) * THREADS
    threads = np.floor(cloth.along) - np.floor(cloth.along[row, column])
    near = np.abs(cloth.across - cloth.across[row, column]) < half
    return cloth.weave(missing=near & np.isin(threads, (0, 1, 2, 3)))


def _hole(generator: np.random.Generator, cloth: Cloth, faultless: np.ndarray) -> np.ndarray:
    """Tear a hole of one to three threads, the ground seen through it, its rim frayed."""
    inside = _blob(generator, len(faultless), generator.uniform(0.06, 0.085), 0.4 + 0.1 * cloth.fibre[0])
    rim = np.clip(1 - np.abs(inside - 0.3) / 0.3, 0, 1)[..., None]
    open_ = np.clip(3 * inside - 1, 0, 1)[..., None]
    return (faultless * (1 + 0.3 * rim)) * (1 - open_) + GROUND * 1.6 * open_


def _stain(generator: np.random.Generator, cloth: Cloth, faultless: np.ndarray) -> np.ndarray:
    """Soak a spot with something brownish, darkest at its edge, where it dried."""
    del cloth
    soaked = _blob(generator, len(faultless), generator.uniform(0.06, 0.13))
    edge = np.exp(-(((soaked - 0.3) / 0.2) ** 2))
    depth = np.clip(2 * soaked, 0, 1) * generator.uniform(0.75, 1.0) + 0.3 * edge
    return faultless * (1 - depth[..., None] * np.array([0.28, 0.36, 0.50]))


def _scratch(generator: np.random.Generator, cloth: Cloth, faultless: np.ndarray) -> np.ndarray:
    """Rub a line into the surface: torn fibres, pale and rough."""
    line = _curve(generator, len(faultless), generator.uniform(0.3, 0.5), 0.15, 0.014)
    rubbed = line * np.clip(0.7 + 0.3 * cloth.fibre.mean(axis=0), 0, 1)
    return faultless + rubbed[..., None] * (np.array([0.90, 0.88, 0.84]) - faultless) * 0.9


def _lint(generator: np.random.Generator, cloth: Cloth, faultless: np.ndarray) -> np.ndarray:
    """Lay a foreign, curly, dark red fibre on the cloth, with its shadow."""
    del cloth
    fibre = _curve(generator, len(faultless), generator.uniform(0.3, 0.45), 0.6, 0.010)[..., None]
    shadow = np.roll(gaussian_filter(fibre, (1, 1, 0)), (2, 2), (0, 1))
    return faultless * (1 - 0.4 * shadow) * (1 - fibre) + np.array([0.36, 0.13, 0.14]) * fibre


DEFECTS = {
    "hole": _hole,
    "lint": _lint,
    "missing_thread": _missing_thread,
    "scratch": _scratch,
    "stain": _stain,
}


def _place(generator: np.random.Generator, size: int) -> np.ndarray:
    """Draw row and column, not too near to the border."""
    return generator.integers(size // 6, size - size // 6, 2)


def _clouds(generator: np.random.Generator, size: int, length: float) -> np.ndarray:
    """Smooth noise of unit deviation that varies over ``length`` pixels."""
    noise = gaussian_filter(generator.normal(0, 1, (size, size)), length / 2, mode="reflect")
    return (noise - noise.mean()) / noise.std()


def _blob(generator: np.random.Generator, size: int, radius: float, rough: float | np.ndarray = 0.5) -> np.ndarray:
    """Irregular spot of ``radius``, in image sides: above 0 inside, about 1 in the middle."""
    row, column = _place(generator, size)
    rows, columns = np.mgrid[:size, :size]
    distance = np.hypot(rows - row, (columns - column) * generator.uniform(0.7, 1.4)) / (radius * size)
    clouds = _clouds(generator, size, max(4.0, radius * size))
    return np.clip(1.3 - distance - 0.6 * rough * (clouds - clouds[row, column]), 0, 1)


def _curve(generator: np.random.Generator, size: int, length: float, bend: float, width: float) -> np.ndarray:
    """Line that turns at random, 0 to 1; ``length`` and ``width`` in image sides, ``bend`` in radians per tenth."""
    steps = int(length * size * 4)
    turns = generator.normal(0, 1, steps // 8 + 2).repeat(8)[:steps]
    heading = generator.uniform(0, 2 * np.pi) + np.cumsum(gaussian_filter(turns, size / 8)) * bend * 8 / size
    path = np.cumsum(np.stack([np.sin(heading), np.cos(heading)]), axis=1) / 4
    rows, columns = np.rint(path - path.mean(axis=1, keepdims=True) + _place(generator, size)[:, None]).astype(int)
    within = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    line = np.zeros((size, size))
    line[rows[within], columns[within]] = 1
    return np.clip(gaussian_filter(line, width * size / 1.5) * width * size * 3, 0, 1)


def _save(array: np.ndarray, path: Path) -> None:
    """Write a PNG and the folder it goes into."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
