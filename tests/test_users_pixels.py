"""Files are read as they look, or refused by name; pixels stay in [0, 1]; masks stay on their object."""

import copy
import pickle
import shutil
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from anomalib.data import Folder, ImageBatch, PredictDataset
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from PIL import Image
from tiny import FOLDERS
from torchvision.transforms import Normalize as FirstNormalize
from torchvision.transforms.v2 import (
    CenterCrop,
    ColorJitter,
    Compose,
    InterpolationMode,
    Lambda,
    Normalize,
    RandomApply,
    RandomCrop,
    RandomHorizontalFlip,
    RandomRotation,
    Resize,
    Transform,
)
from torchvision.transforms.v2.functional import normalize

from anomalib_rdpp import AAND, RDPP
from anomalib_rdpp.pixels import read_image, read_right, refuse_normalize

CASES = Path(__file__).parent / "cases"
RAMP = np.linspace(0, 1, 96)[None] * np.ones((64, 1))
NORMALIZE = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def write(path, kind):
    """Write the ramp in one of the formats of cameras and their software."""
    sixteen, eight = (RAMP * 65535).round().astype(np.uint16), (RAMP * 255).round().astype(np.uint8)
    colour = Image.fromarray(eight).convert("RGB")
    tiffs = {
        "16 bits": (sixteen, {}),
        "white is 0": (65535 - sixteen, {"photometric": "miniswhite"}),
        "12 bits": ((RAMP * 4095).round().astype(np.uint16), {"bitspersample": 12}),
        "float": (RAMP.astype(np.float32), {}),
        "counts": (RAMP.astype(np.float32) * 255, {}),
        "signed": (sixteen.astype(np.int16), {}),
        "32 bits": (sixteen.astype(np.uint32), {}),
        "double": (RAMP, {}),
        "pages": (np.stack([eight] * 3), {"photometric": "minisblack"}),
        "float, white is 0": (1 - RAMP.astype(np.float32), {"photometric": "miniswhite"}),
        "signed 8 bits": (eight.astype(np.int8), {}),
        "planes": (np.stack([sixteen] * 3), {"photometric": "rgb", "planarconfig": "separate"}),
    }
    if kind in tiffs:
        pixels, options = tiffs[kind]
        tifffile.imwrite(path, pixels, **options)
    elif kind == "16 bit png":
        cv2.imwrite(str(path), sixteen)
    elif kind == "10 bit pgm":
        path.write_bytes(b"P5 96 64 1023\n" + (RAMP * 1023).round().astype(">u2").tobytes())
    elif kind in {"opaque", "transparent"}:
        colour.putalpha(255 if kind == "opaque" else Image.fromarray(eight))
        colour.save(path, lossless=True)
    elif kind == "key":
        colour.quantize(16).save(path, transparency=0)
    elif kind == "16 bit key":
        Image.fromarray(sixteen).save(path, transparency=0)
    elif kind == "cut off":
        write(path, "16 bits" if path.suffix == ".tif" else "RGB")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "damaged":
        path.write_bytes(b"no image")
    else:
        colour.convert(kind).save(path)


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("16 bits", ".tif"),
        ("white is 0", ".tif"),
        ("12 bits", ".tif"),
        ("float", ".tif"),
        ("float, white is 0", ".tif"),
        ("16 bit png", ".png"),
        ("10 bit pgm", ".pgm"),
        ("opaque", ".png"),
        ("opaque", ".webp"),
        ("RGB", ".bmp"),
        ("L", ".png"),
        ("LA", ".png"),
    ],
)
def test_file_is_read_as_it_looks(tmp_path, kind, suffix):
    path = tmp_path / f"image{suffix}"
    write(path, kind)
    image = read_image(path, as_tensor=True)
    assert image.shape == (3, 64, 96)
    assert image.dtype == torch.float32
    np.testing.assert_allclose(image, np.stack([RAMP] * 3), atol=0.003)
    np.testing.assert_allclose(read_image(path), image.permute(1, 2, 0), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "suffix", "reason"),
    [
        ("counts", ".tif", "floating point from 0 to 255"),
        ("signed", ".tif", "mode 'I'"),
        ("32 bits", ".tif", "mode 'I'"),
        ("double", ".tif", "damaged, or holds pixels that Pillow doesn't know"),
        ("damaged", ".png", "damaged"),
        ("pages", ".tif", "holds 3 pages"),
        ("CMYK", ".jpg", "mode 'CMYK'"),
        ("transparent", ".png", "has transparent pixels"),
        ("key", ".png", "has transparent pixels"),
        ("16 bit key", ".png", "has transparent pixels"),
        ("signed 8 bits", ".tif", "numbers with a sign"),
        ("planes", ".tif", "separate planes"),
        ("cut off", ".png", "is damaged"),
        ("cut off", ".jpg", "is damaged"),
    ],
)
def test_file_of_unknown_meaning_is_refused_by_name(tmp_path, kind, suffix, reason):
    path = tmp_path / f"part-17{suffix}"
    write(path, kind)
    with pytest.raises(ValueError, match=rf"part-17{suffix}' .*{reason}.*save it as"):
        read_image(path)


@pytest.fixture
def deep_folder(tmp_path):
    """Folder data of 16 bits."""
    for folder in ("train", "normal", "defect"):
        (tmp_path / folder).mkdir()
        for i in range(2):
            (tmp_path / folder / f"{i}.png").write_bytes((CASES / "grey16.png").read_bytes())
    dirs = {"normal_dir": "train", "normal_test_dir": "normal", "abnormal_dir": "defect"}
    return Folder(name="deep", root=tmp_path, num_workers=0, val_split_mode="same_as_test", **dirs)


def small(model_class=RDPP, **arguments):
    arguments = {"pre_processor": model_class.configure_pre_processor((64, 64)), **arguments}
    return model_class("resnet18", pre_trained=False, evaluator=False, visualizer=False, **arguments)


def test_16_bits_are_one_image_with_8_for_datamodule_and_predict(deep_folder, tmp_path, caplog):
    model, engine = small(), Engine(accelerator="cpu", devices=1, default_root_dir=tmp_path)
    seen, step = [], model.validation_step
    model.validation_step = lambda batch, *more: seen.append(batch.image) or step(batch, *more)
    with caplog.at_level("INFO"):
        engine.validate(model, datamodule=deep_folder)
    assert "4 images have 16 bits and are read as value / range" in caplog.text
    expected = Resize((64, 64))(read_image(CASES / "grey8.png", as_tensor=True))
    torch.testing.assert_close(seen[0][0], expected, atol=0.004, rtol=0)
    maps = [engine.predict(model, dataset=PredictDataset(CASES / f"grey{bits}.png"))[0].anomaly_map for bits in (16, 8)]
    torch.testing.assert_close(*maps, atol=0.06, rtol=0)  # 8 bits are coarser
    torch.testing.assert_close(deep_folder.train_data[0].image, seen[0][0], atol=0.004, rtol=0)


def test_dataset_that_reads_right_goes_to_worker_processes(deep_folder):
    deep_folder.setup()
    dataset = deep_folder.train_data
    name = type(dataset).__name__
    read_right(dataset)
    read_right(dataset)
    for each in (dataset, pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset), dataset.subsample([0])):
        assert type(each).__name__ == name
        assert each[0].image.mean() < 0.9


def test_damaged_file_of_8_bits_is_named_by_a_dataset(deep_folder, tmp_path):
    write(tmp_path / "train/0.png", "cut off")
    write(tmp_path / "train/1.png", "RGB")
    deep_folder.setup()
    read_right(deep_folder.train_data)
    with pytest.raises(ValueError, match=r"train/0\.png' is damaged"):
        list(deep_folder.train_data)


def test_turned_photographs_are_said(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "turned.jpg", exif=exif)
    dataset = PredictDataset(tmp_path / "turned.jpg")
    with pytest.warns(UserWarning, match=r"1 images are marked as turned \(EXIF\), the first is '.*turned\.jpg'"):
        read_right(dataset)
    assert dataset[0].image.shape[-2:] == (32, 64), "as anomalib reads it"


@pytest.mark.parametrize(("kind", "suffix"), [("transparent", ".png"), ("float", ".tif")])
def test_masks_of_unknown_meaning_are_refused_by_name(tiny_folder, tmp_path, kind, suffix):
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    for path in sorted((tmp_path / "ground_truth/square").iterdir()):
        path.unlink()
        write(path.with_suffix(suffix), kind)
    data = Folder("masks", root=tmp_path, **FOLDERS, num_workers=0)
    data.setup()
    with pytest.raises(ValueError, match=f"{suffix}' is a mask with"):
        read_right(data.test_data)


def test_masks_in_jpeg_are_said_once(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    for path in sorted((tmp_path / "ground_truth/square").iterdir()):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    data = Folder("masks", root=tmp_path, **FOLDERS, num_workers=0, val_split_mode="same_as_test")
    data.setup()
    with pytest.warns(UserWarning, match=r"4 masks are JPEGs.*the first is '.*square/0\.jpg'") as said:
        read_right(data.test_data)
    assert len(said) == 1


def test_dark_white_and_overshooting_images_are_images():
    images = torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64), 1.6 * torch.rand(3, 64, 64) - 0.3])
    model = small()
    batch = model.on_before_batch_transfer(ImageBatch(image=images), 0)
    model.on_train_batch_start(batch, 0)
    assert batch.image.min() == 0
    assert batch.image.max() == 1


def test_bicubic_resize_is_no_normalisation():
    small(pre_processor=PreProcessor(Resize((64, 64), InterpolationMode.BICUBIC))).setup("fit")


class Own(Transform):
    def __init__(self):
        super().__init__()
        self.steps = {"last": NORMALIZE}

    def forward(self, *images):
        return self.steps["last"](*images)


@pytest.mark.parametrize(
    "hidden",
    [
        Compose([Resize((64, 64)), Compose([NORMALIZE])]),
        RandomApply([NORMALIZE], p=0.01),
        torch.nn.Sequential(Resize((64, 64)), NORMALIZE),
        Lambda(lambda image: (image - 0.5) / 0.5),
        Lambda(lambda image: NORMALIZE(image)),  # noqa: PLW0108
        partial(normalize, mean=[0.5] * 3, std=[0.5] * 3),
        FirstNormalize([0.5] * 3, [0.5] * 3),
        Own(),
        Lambda(lambda image: image * 255),
        Lambda(lambda image: image - image.mean()),
        Lambda(lambda image: torch.nn.functional.instance_norm(image[None])[0]),
    ],
    ids=["compose", "random", "sequential", "sum", "lambda", "partial", "first", "own", "bytes", "mean", "instance"],
)
def test_normalize_is_refused_wherever_it_hides(hidden):
    with pytest.raises(ValueError, match=r"here contains Normalize or leaves \[0, 1\]"):
        refuse_normalize(hidden, "here")


def test_normalize_in_augmentations_is_refused(tiny_data, tmp_path):
    tiny_data.val_augmentations = RandomApply([NORMALIZE], p=0.01)
    with pytest.raises(ValueError, match="The transform of the val images contains Normalize"):
        Engine(accelerator="cpu", devices=1, default_root_dir=tmp_path).validate(small(), datamodule=tiny_data)


@pytest.mark.parametrize(
    "moving", [RandomCrop(32), RandomHorizontalFlip(), RandomRotation(10), Lambda(lambda image: image.flip(-1))]
)
def test_foreground_masks_refuse_what_moves_pixels(moving, tiny_data, tiny_folder, tmp_path):
    tiny_data.train_augmentations = Compose([ColorJitter(), RandomApply([moving])])
    model = small(AAND, foreground_dir=str(tiny_folder))
    with pytest.raises(ValueError, match=f"train images contains {type(moving).__name__}, which may move pixels"):
        Engine(max_epochs=2, accelerator="cpu", devices=1, default_root_dir=tmp_path).fit(model, datamodule=tiny_data)


def test_foreground_masks_refuse_a_crop_before_the_model(tiny_folder):
    crop = PreProcessor(Compose([Resize((96, 96)), CenterCrop(64)]))
    with pytest.raises(ValueError, match="pre-processor of AAND contains CenterCrop"):
        small(AAND, foreground_dir=str(tiny_folder), pre_processor=crop).setup("fit")


def test_foreground_masks_allow_what_keeps_pixels_in_place(tiny_folder):
    pre_processor = PreProcessor(Compose([Resize((64, 64)), RandomApply([ColorJitter()])]))
    small(AAND, foreground_dir=str(tiny_folder), pre_processor=pre_processor).setup("fit")
