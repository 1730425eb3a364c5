"""Published weights in and out: ours is the same network, and bad files say what is wrong with them."""

import os
import pickle
from copy import copy
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.cli import AnomalibCLI
from anomalib.engine import Engine
from anomalib.models.components.backbone import get_decoder
from anomalib.models.image.reverse_distillation.components import get_bottleneck_layer
from lightning.pytorch import Trainer
from scipy.ndimage import gaussian_filter
from torch.nn import functional

from anomalib_rdpp import RDPP
from anomalib_rdpp.published import load_checkpoint, load_published, main, save_checkpoint, to_published

CHANNELS = {"resnet18": (64, 128, 256), "resnet50": (256, 512, 1024), "wide_resnet50_2": (256, 512, 1024)}
CASES = [*((backbone, True) for backbone in CHANNELS), ("resnet18", False)]  # RD++, RD
TINY = {"backbone": "resnet18", "pre_trained": False}


def student(backbone):
    """Give bottleneck and decoder of the official code, as anomalib builds them, without weights."""
    with torch.device("meta"):
        width = 128 if backbone.startswith("wide") else 64
        return get_bottleneck_layer(backbone, width_per_group=width), get_decoder(backbone)


def published(backbone="resnet18", projection=True):
    """Give random weights and statistics in the layout of the official code; tensors are shared, dicts are not."""
    return {part: copy(values) for part, values in drawn(backbone, projection).items()}


@lru_cache(maxsize=2)
def drawn(backbone, projection):
    """Draw what ``published`` gives, without our code."""
    torch.manual_seed(7)
    bn, decoder = (network.to_empty(device="cpu") for network in student(backbone))
    stored = {"decoder": decoder.state_dict(), "bn": bn.state_dict()}
    for values in stored.values():
        for name, value in values.items():
            if name.endswith("num_batches_tracked"):
                value.fill_(int(torch.randint(1, 1000, ())))
            elif value.ndim == 1:  # of BatchNorm
                value.uniform_(0.5, 1.5)
            else:
                value.normal_(std=value[0].numel() ** -0.5)
    if projection:
        stored["proj"] = {}
        for letter, c in zip("abc", CHANNELS[backbone], strict=True):
            for index, (fan_in, fan_out) in zip(
                (0, 3, 6, 9), ((c, c // 2), (c // 2, c // 4), (c // 4, c // 2), (c // 2, c)), strict=True
            ):
                stored["proj"][f"proj_{letter}.proj.{index}.weight"] = torch.randn(fan_out, fan_in, 3, 3) / (
                    3 * fan_in**0.5
                )
                stored["proj"][f"proj_{letter}.proj.{index}.bias"] = torch.randn(fan_out)
    return stored


def restate(stored, backbone, teacher, size):
    """State the methods' formulas once more, straight from a published file: student, map and score."""
    bn, decoder = student(backbone)
    bn.eval().load_state_dict(stored["bn"], assign=True)
    decoder.eval().load_state_dict(stored["decoder"], assign=True)
    seen = list(teacher)
    if "proj" in stored:
        for scale, letter in enumerate("abc"):
            for index in (0, 3, 6, 9):
                weight, bias = (stored["proj"][f"proj_{letter}.proj.{index}.{kind}"] for kind in ("weight", "bias"))
                convolved = functional.conv2d(seen[scale], weight, bias, padding=1)
                seen[scale] = functional.leaky_relu(functional.instance_norm(convolved), 0.01)
    reconstructed = decoder(bn(seen))
    anomaly_map = torch.zeros(len(teacher[0]), 1, *size)
    for t, s in zip(teacher, reconstructed, strict=True):
        distance = 1 - (t * s).sum(1, keepdim=True) / (t.norm(dim=1, keepdim=True) * s.norm(dim=1, keepdim=True))
        anomaly_map += functional.interpolate(distance, size, mode="bilinear", align_corners=True)
    smooth = np.stack([gaussian_filter(image.numpy(), sigma=4) for image in anomaly_map[:, 0]])
    return reconstructed, torch.from_numpy(smooth).unsqueeze(1), torch.from_numpy(smooth.max(axis=(1, 2)))


def assert_equal(actual, expected):
    """Same parts, same names, same bits."""
    assert actual.keys() == expected.keys()
    for part in expected:
        assert actual[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            assert torch.equal(actual[part][name], value), (part, name)
            assert actual[part][name].dtype == value.dtype


@pytest.fixture
def file(tmp_path):
    """A good file of RD++."""
    path = tmp_path / "published.pth"
    torch.save(published(), path)
    return path


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def loaded(request, tmp_path_factory):
    """What a file holds and our model of it."""
    backbone, projection = request.param
    stored = published(backbone, projection)
    path = tmp_path_factory.mktemp("published") / "published.pth"
    torch.save(stored, path)
    model = load_published(path, backbone, pre_trained=False).eval()
    path.unlink()  # up to half a gigabyte
    return SimpleNamespace(backbone=backbone, stored=stored, model=model)


@torch.no_grad()
def test_published_network_is_ours(loaded):
    model = loaded.model.model
    images = torch.rand(2, 3, 64, 64)
    teacher = model.teacher(images)
    reconstructed, anomaly_map, score = restate(loaded.stored, loaded.backbone, teacher, (64, 64))
    ours = model.student(model.project(teacher))
    prediction = model(images)
    for actual, expected in zip(ours, reconstructed, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(prediction.anomaly_map, anomaly_map, rtol=0, atol=1e-5)
    torch.testing.assert_close(prediction.pred_score, score, rtol=0, atol=1e-5)


def test_theirs_to_ours_to_theirs_is_bit_equal(loaded):
    assert_equal(to_published(loaded.model), loaded.stored)


def test_command_goes_there_and_back_bit_equal(file, tmp_path, capsys):
    main([str(file), str(tmp_path / "model.ckpt"), "--backbone", "resnet18", "--no-pre-trained"])
    assert "anomalib export --model RDPP --model.backbone resnet18" in capsys.readouterr().out
    main([str(tmp_path / "model.ckpt"), str(tmp_path / "back.pth"), "--to-published"])
    assert_equal(torch.load(tmp_path / "back.pth", weights_only=True), torch.load(file, weights_only=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.pth", "model.ckpt", "published.pth"]


def test_leftovers_of_published_files_are_tolerated(file):
    stored = torch.load(file, weights_only=True)
    expected = {part: dict(values) for part, values in stored.items()}
    stored["bn"]["memory1.weight"] = torch.rand(3)
    stored["proj"]["proj_a.proj.1.num_batches_tracked"] = torch.tensor(3)
    for values in (stored["decoder"], expected["decoder"]):
        for name in [name for name in values if name.endswith("num_batches_tracked")]:
            values[name] = torch.tensor(0)
            if values is stored["decoder"]:
                del values[name]
    torch.save(stored, file)
    assert_equal(to_published(load_published(file, **TINY)), expected)


def test_prefix_of_data_parallel_is_stripped(file):
    stored = torch.load(file, weights_only=True)
    torch.save(
        {part: {f"module.{name}": value for name, value in values.items()} for part, values in stored.items()}, file
    )
    assert_equal(to_published(load_published(file, **TINY)), stored)


@pytest.mark.parametrize(
    "options", [{"student": "light"}, {"projection": "light"}, {"bottleneck": "oce"}, {"scales": [3]}]
)
def test_light_or_ablated_model_has_no_published_layout(options):
    with pytest.raises(ValueError, match="this model's are light or ablated"):
        to_published(RDPP(**TINY, **options))


def test_untagged_backbone_gets_the_teacher_of_the_published_programs(file, monkeypatch):
    built = {}
    monkeypatch.setattr("anomalib_rdpp.published.RDPP", lambda backbone, *_, **__: built.update(name=backbone) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_published(file, "resnet18")
    assert built["name"] == "resnet18.tv_in1k"


def test_file_is_checked_before_the_teacher_is_built(file, monkeypatch):
    monkeypatch.setattr("anomalib_rdpp.published.RDPP", lambda *_, **__: pytest.fail("the teacher was built"))
    with pytest.raises(ValueError, match="doesn't fit"):
        load_published(file)


@pytest.mark.parametrize("projection", [True, False], ids=["RD++", "RD"])
def test_checkpoint_gives_the_same_model_back(projection, tmp_path):
    torch.save(published(projection=projection), tmp_path / "published.pth")
    model = load_published(tmp_path / "published.pth", **TINY).eval()
    save_checkpoint(model, tmp_path / "model.ckpt")
    again = RDPP.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval()
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(again(images).anomaly_map, model(images).anomaly_map)


@pytest.mark.parametrize("projection", [True, False], ids=["RD++", "RD"])
def test_anomalib_tests_and_predicts_from_the_checkpoint(projection, tiny_folder, tiny_data, tmp_path):
    torch.save(published(projection=projection), tmp_path / "published.pth")
    save_checkpoint(load_published(tmp_path / "published.pth", **TINY), tmp_path / "model.ckpt")
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False)
    arguments = {"model": RDPP(**TINY, projection=projection, visualizer=False), "ckpt_path": tmp_path / "model.ckpt"}
    assert 0 <= engine.test(**arguments, datamodule=tiny_data)[0]["image_AUROC"] <= 1
    raw = engine.predict(**arguments, data_path=tiny_folder / "test" / "good")
    assert all(torch.equal(batch.pred_label, batch.pred_score > 0.5) for batch in raw)  # what the docstring warns of


def test_thresholds_come_from_validate(file, tiny_data, tmp_path):
    model = load_published(file, **TINY)
    assert model.post_processor.image_threshold.isnan()
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False)
    engine.validate(model, datamodule=tiny_data)
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert RDPP.load_from_checkpoint(tmp_path / "model.ckpt").post_processor.image_threshold.isfinite()


def test_openvino_model_by_two_commands(file, tmp_path, monkeypatch):
    """In this process; tests/test_docs.py and tests/test_contract.py run commands as typed."""
    monkeypatch.chdir(tmp_path)
    main([file.name, "model.ckpt", "--backbone", "resnet18", "--no-pre-trained"])
    model = ["--model", "RDPP", "--model.backbone", "resnet18", "--model.pre_trained", "false"]
    AnomalibCLI(args=["export", *model, "--export_type", "openvino", "--ckpt_path", "model.ckpt"])
    exported = ov.Core().compile_model(next(tmp_path.rglob("model.xml")), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = torch.rand(1, 3, 256, 256)
    outputs = exported(images.numpy())
    expected = RDPP.load_from_checkpoint(tmp_path / "model.ckpt").eval()(images)
    torch.testing.assert_close(torch.from_numpy(outputs["anomaly_map"]), expected.anomaly_map, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(outputs["pred_score"]), expected.pred_score, rtol=0, atol=1e-4)


class RunsCode:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


def with_code(path):
    torch.save({**published(), "bn": RunsCode(path.parent / "trace")}, path)


def plain_pickle_with_code(path):
    path.write_bytes(pickle.dumps(RunsCode(path.parent / "trace")))


def old_pickle_with_code(path):
    path.write_bytes(pickle.dumps(RunsCode(path.parent / "trace"), protocol=2))


def whole_module(path):
    torch.save(RDPP(**TINY).model.student, path)


def truncated(path):
    torch.save(published(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.touch()


def text(path):
    path.write_text("<html>Quota exceeded</html>")


def other_backbone(path):
    torch.save(published("resnet50"), path)


def half_neck(path):
    stored = published()
    stored["bn"]["conv1.weight"] = stored["bn"]["conv1.weight"][:64]
    torch.save(stored, path)


def missing_tensor(path):
    stored = published()
    del stored["proj"]["proj_b.proj.6.bias"]
    torch.save(stored, path)


def unknown_tensor(path):
    stored = published()
    stored["decoder"]["layer4.weight"] = torch.rand(3)
    torch.save(stored, path)


def number_for_a_tensor(path):
    stored = published()
    stored["decoder"]["layer1.0.bn1.bias"] = 3.0
    torch.save(stored, path)


def other_program(path):
    torch.save({"epoch": 3, "model": published()["decoder"]}, path)


def extra_part(path):
    torch.save({**published(), "optimizer": {}}, path)


def parts_that_are_no_dicts(path):
    torch.save({"bn": torch.rand(3), "decoder": {}}, path)


def list_of_tensors(path):
    torch.save([torch.rand(3)], path)


def anomalib_checkpoint(path):
    save_checkpoint(RDPP(**TINY), path)


def all_nan(path):
    stored = published()
    stored["decoder"]["layer1.0.conv1.weight"] = stored["decoder"]["layer1.0.conv1.weight"] * float("nan")
    torch.save(stored, path)


def missing(path):
    del path


BAD = {
    with_code: "was not loaded: it holds posix.mkdir, and objects other than tensors can run code",
    plain_pickle_with_code: "was not loaded",
    old_pickle_with_code: "was not loaded: it holds posix.mkdir, and objects other than tensors can run code",
    whole_module: "was not loaded: it holds anomalib_rdpp.student.Student",
    truncated: "damaged, incomplete or no PyTorch file",
    empty: "damaged, incomplete or no PyTorch file",
    text: "damaged, incomplete or no PyTorch file",
    other_backbone: "doesn't fit backbone 'resnet18': .* It fits resnet50: name that backbone",
    half_neck: r"1 entries .* \(bn.conv1.weight\). No other backbone fits",
    missing_tensor: r"1 entries are missing.* \(proj.proj_b.proj.6.bias\)",
    unknown_tensor: r"1 entries .* unknown .* \(decoder.layer4.weight\)",
    number_for_a_tensor: r"1 entries .* \(decoder.layer1.0.bn1.bias\)",
    other_program: "holds epoch, model; expected the state dicts bn and decoder",
    extra_part: "holds decoder, bn, proj, optimizer; expected the state dicts bn and decoder",
    parts_that_are_no_dicts: "expected the state dicts bn and decoder",
    list_of_tensors: "holds a list, not a dict of state dicts",
    anomalib_checkpoint: "a checkpoint of anomalib needs no conversion",
    all_nan: r"holds NaN or infinite numbers in 1 entries \(decoder.layer1.0.conv1.weight\)",
    missing: "No file at",
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_bad_file_says_what_is_wrong(make, tmp_path, capsys, request):
    path = tmp_path / "bad.pth"
    make(path)
    request.getfixturevalue("undrawn")  # from here on
    with pytest.raises((ValueError, FileNotFoundError), match=BAD[make]) as caught:
        load_published(path, **TINY)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "trace").exists()
    with pytest.raises(SystemExit) as ended:
        main([str(path), str(tmp_path / "out.ckpt"), "--backbone", "resnet18", "--no-pre-trained"])
    assert ended.value.code == 2
    assert str(caught.value) in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out.ckpt").exists()


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
def test_file_truncated_anywhere_is_refused(share, file, tmp_path):
    (tmp_path / "cut.pth").write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match="incomplete"):
        load_published(tmp_path / "cut.pth", **TINY)


def test_unknown_backbone_names_those_there_are(file):
    with pytest.raises(ValueError, match="No published file has backbone 'vgg16'; choose one of resnet18"):
        load_published(file, "vgg16")


def test_only_a_checkpoint_of_rdpp_goes_back(file, tmp_path):
    with pytest.raises(ValueError, match="no anomalib checkpoint: it holds decoder, bn, proj"):
        load_checkpoint(file)
    stored = {"pytorch-lightning_version": "2.6.0", "state_dict": {"model.weight": torch.rand(3)}}
    torch.save(stored, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="another model than RDPP"):
        load_checkpoint(tmp_path / "other.ckpt")


def test_nothing_is_written_over_unless_forced(file, tmp_path, capsys):
    out = tmp_path / "model.ckpt"
    out.write_text("precious")
    arguments = [str(file), str(out), "--backbone", "resnet18", "--no-pre-trained"]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "exists: choose another name, or write over it with --force" in capsys.readouterr().err
    assert out.read_text() == "precious"
    main([*arguments, "--force"])
    assert isinstance(load_checkpoint(out), RDPP)


def test_failed_write_leaves_nothing_behind(file, tmp_path, monkeypatch):
    def fail(*_, **__):
        msg = "No space left on device"
        raise OSError(msg)

    monkeypatch.setattr(Trainer, "save_checkpoint", fail)
    with pytest.raises(SystemExit):
        main([str(file), str(tmp_path / "model.ckpt"), "--backbone", "resnet18", "--no-pre-trained"])
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_options_of_one_direction_are_refused_in_the_other(file, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(file), str(tmp_path / "back.pth"), "--to-published", "--backbone", "resnet18"])
    assert "leave those options out" in capsys.readouterr().err


def test_plain_rd_trains_its_student_by_distillation_alone():
    model = RDPP(**TINY, projection=False)
    features = model.model(torch.rand(2, 3, 64, 64))
    terms = model.loss(features)
    assert sorted(terms) == ["distillation", "loss"]
    assert torch.equal(terms["loss"], terms["distillation"])
    assert all(torch.equal(seen, teacher) for seen, teacher in zip(features.projected, features.teacher, strict=True))
    (group,) = model.configure_optimizers().param_groups
    assert (group["lr"], group["betas"]) == (0.005, (0.5, 0.999))
    terms["loss"].backward()
    idle = {name.split(".")[1] for name, weight in model.model.student.named_parameters() if weight.grad is None}
    assert idle <= {"conv4", "bn4"}  # which the published bottleneck holds and never calls
    assert not [parameter for parameter in model.model.teacher.parameters() if parameter.requires_grad]


def test_checkpoint_of_before_scores_by_the_maximum(tmp_path):
    save_checkpoint(RDPP(**TINY), tmp_path / "new.ckpt")
    stored = torch.load(tmp_path / "new.ckpt", weights_only=False)
    for name in ("score", "score_fraction", "bottleneck", "scales"):
        del stored["hyper_parameters"][name]
    torch.save(stored, tmp_path / "old.ckpt")
    images = torch.rand(2, 3, 64, 64)
    new, old = (RDPP.load_from_checkpoint(tmp_path / f"{age}.ckpt").eval().model(images) for age in ("new", "old"))
    torch.testing.assert_close(old.anomaly_map, new.anomaly_map)
    torch.testing.assert_close(old.pred_score, old.anomaly_map.amax((1, 2, 3)))
    assert (new.pred_score < old.pred_score).all()
