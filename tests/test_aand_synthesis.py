"""Synthetic anomalies of AAND: where they lie, what their masks say, which folders are refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_rdpp.synthesis.blending import TextureAnomalies, estimate_foreground


@pytest.fixture
def textures(tmp_path):
    folder = tmp_path / "textures" / "striped"
    folder.mkdir(parents=True)
    for i in range(3):
        save(folder / f"{i}.png", np.random.default_rng(i).integers(0, 255, (48, 40, 3), dtype=np.uint8))
    return folder.parent


@pytest.fixture
def files(tmp_path):
    """Two images of 80 x 96 pixels, object on the left half, and the folder of their masks."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    mask = np.zeros((80, 96), np.uint8)
    mask[:, :48] = 255
    for i in range(2):
        save(tmp_path / "images" / f"{i}.jpg", np.full((80, 96, 3), 90, np.uint8))
        save(tmp_path / "masks" / f"{i}.png", mask)
    return [str(tmp_path / "images" / f"{i}.jpg") for i in range(2)], tmp_path / "masks"


def save(path, pixels):
    Image.fromarray(pixels).save(path)


def disc(background, value, side=64):
    """One image with an object of 16 pixels' radius."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    inside = (rows - side / 2) ** 2 + (columns - side / 2) ** 2 < 16**2
    return torch.where(inside, value, background).expand(1, 3, side, side), inside


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (32, 128)])
@pytest.mark.parametrize("is_textured", [False, True])
def test_mask_is_exactly_what_changed(textures, size, is_textured):
    images = torch.rand(4, 3, *size)
    blended, masks, _ = TextureAnomalies(str(textures) if is_textured else None, probability=1)(images)
    assert masks.shape == (4, 1, *size)
    assert torch.equal(masks, (blended != images).any(dim=1, keepdim=True))
    assert masks.any(dim=(1, 2, 3)).all(), "every image has its anomaly"


@pytest.mark.parametrize("image", [torch.zeros(8, 3, 64, 64), torch.ones(8, 3, 64, 64)])
def test_pixels_stay_within_zero_and_one(textures, image):
    for texture_dir in (None, str(textures)):
        blended, _, _ = TextureAnomalies(texture_dir, probability=1)(image)
        assert blended.isfinite().all()
        assert ((blended >= 0) & (blended <= 1)).all()


def test_input_is_left_as_it_was():
    images = torch.rand(2, 3, 64, 64)
    before = images.clone()
    TextureAnomalies(probability=1)(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_kept(dtype):
    blended, masks, _ = TextureAnomalies(probability=1)(torch.rand(1, 3, 64, 64).to(dtype))
    assert blended.dtype == dtype
    assert masks.dtype == torch.bool


def test_probability_is_the_share_of_images_with_an_anomaly():
    def share(probability):
        _, masks, _ = TextureAnomalies(probability=probability)(torch.rand(40, 3, 32, 32))
        return masks.any(dim=(1, 2, 3)).float().mean()

    assert share(0) == 0
    assert 0.25 < share(0.5) < 0.75
    assert share(1) == 1


@pytest.mark.parametrize("is_textured", [False, True])
def test_one_seed_gives_one_result_whatever_other_generators_do(textures, is_textured):
    import random

    images, results = torch.rand(4, 3, 64, 64), []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(TextureAnomalies(str(textures) if is_textured else None)(images))
        random.random()
        np.random.rand()  # noqa: NPY002
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("background", "value"), [(0.1, 0.8), (0.9, 0.3)])
def test_estimated_foreground_is_what_stands_out_from_the_border(background, value):
    image, inside = disc(torch.tensor(background), torch.tensor(value))
    foreground = estimate_foreground(image)
    assert foreground.shape == (1, 1, 64, 64)
    assert (foreground[0, 0] == inside).float().mean() > 0.97


def test_estimated_foreground_of_an_even_image_is_all_of_it():
    assert estimate_foreground(torch.full((2, 3, 64, 64), 0.4)).all()


def test_anomalies_lie_inside_the_estimated_foreground():
    image, _ = disc(torch.tensor(0.1), torch.tensor(0.8))
    _, masks, foreground = TextureAnomalies(foreground="estimate", probability=1)(image.repeat(8, 1, 1, 1))
    assert masks.any()
    assert not (masks & ~foreground).any()


def test_anomalies_lie_inside_the_masks_of_a_folder(files):
    paths, folder = files
    anomalies = TextureAnomalies(foreground_dir=str(folder), probability=1)
    _, masks, foreground = anomalies(torch.rand(2, 3, 64, 64), paths)
    assert foreground[..., :32].all()
    assert not foreground[..., 32:].any()
    assert masks.any()
    assert not (masks & ~foreground).any()


def test_image_without_foreground_stays_normal(files):
    paths, folder = files
    save(folder / "0.png", np.zeros((80, 96), np.uint8))
    images = torch.rand(2, 3, 64, 64)
    blended, masks, _ = TextureAnomalies(foreground_dir=str(folder), probability=1)(images, paths)
    assert torch.equal(blended[0], images[0])
    assert not masks[0].any()
    assert masks[1].any()


def test_image_without_mask_is_refused(files):
    paths, folder = files
    (folder / "1.png").unlink()
    with pytest.raises(ValueError, match=r"No foreground mask for .*1\.jpg.* expected .*1\.png"):
        TextureAnomalies(foreground_dir=str(folder))(torch.rand(2, 3, 64, 64), paths)


def test_mask_of_another_size_than_its_image_file_is_refused(files):
    paths, folder = files
    save(folder / "1.png", np.ones((64, 64), np.uint8))
    with pytest.raises(ValueError, match=r"1\.png' has 64 x 64 pixels .* its image 80 x 96"):
        TextureAnomalies(foreground_dir=str(folder))(torch.rand(2, 3, 64, 64), paths)


def test_unreadable_mask_is_refused(files):
    paths, folder = files
    (folder / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1\.png' can't be read"):
        TextureAnomalies(foreground_dir=str(folder))(torch.rand(2, 3, 64, 64), paths)


def test_masks_of_a_folder_need_image_paths(files):
    with pytest.raises(ValueError, match="no image paths"):
        TextureAnomalies(foreground_dir=str(files[1]))(torch.rand(2, 3, 64, 64))


def test_unreadable_texture_is_refused_by_name(textures):
    for path in textures.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"Texture '.*\.png' can't be read"):
        TextureAnomalies(str(textures), probability=1)(torch.rand(2, 3, 64, 64))


def test_textures_with_an_upper_case_suffix_are_found(textures):
    for path in textures.rglob("*.png"):
        path.rename(path.with_suffix(".PNG"))
    TextureAnomalies(str(textures)).check_folders()


def test_texture_folder_without_images_is_refused(tmp_path):
    (tmp_path / "readme.txt").write_text("no textures")
    with pytest.raises(ValueError, match="No texture images in"):
        TextureAnomalies(str(tmp_path)).check_folders()


@pytest.mark.parametrize("name", ["texture_dir", "foreground_dir"])
def test_folder_that_does_not_exist_is_refused(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name} is no folder"):
        TextureAnomalies(**{name: str(tmp_path / "nowhere")}).check_folders()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"foreground": "otsu"}, "foreground must be one of none, estimate, got 'otsu'"),
        ({"foreground": "estimate", "foreground_dir": "masks"}, "give foreground or foreground_dir"),
        ({"probability": 1.5}, "within 0 and 1, got 1.5"),
        ({"probability": -0.1}, "within 0 and 1, got -0.1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextureAnomalies(**arguments)
