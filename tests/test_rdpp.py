"""RD++: what it computes, who learns, what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.pre_processing import PreProcessor
from tiny import TINY
from torch.nn import functional
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_rdpp import RDPP
from anomalib_rdpp.anomaly_map import AnomalyMapGenerator
from anomalib_rdpp.rdpp.loss import RDPPLoss, contrast_loss, reconstruction_loss, transport_loss
from anomalib_rdpp.rdpp.torch_model import Projection, RDPPFeatures, RDPPModel
from anomalib_rdpp.student import Student
from anomalib_rdpp.synthesis.noise import SimplexNoise
from anomalib_rdpp.teacher import Teacher

# Slow are those that tests/test_published.py builds with a file's weights.
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet50.tv_in1k", "wide_resnet50_2.tv_in1k")]
RESNET = {"backbone": "resnet18", "pre_trained": False}
NOISE = str(Path(__file__).parents[1] / "anomalib_rdpp/synthesis/noise.py")  # alone: the package takes seconds


def features(batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 8 * 2**k, 16 // 2**k, 16 // 2**k, generator=generator) for k in range(3)]


# -- the graph


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", *MORE])
def test_any_backbone_gives_map_and_score(backbone):
    model = RDPPModel(backbone, pre_trained=False).eval()
    prediction = model(torch.rand(2, 3, 64, 96))
    assert prediction.anomaly_map.shape == (2, 1, 64, 96)
    highest = prediction.anomaly_map.flatten(1).sort(descending=True).values[:, :61]  # 1 % of 6,144 pixels
    torch.testing.assert_close(prediction.pred_score, highest.mean(1))


def test_neck_of_a_wide_resnet_has_its_full_width():
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Student("wide_resnet50_2").bottleneck.bn_layer.parameters())
        full = sum(p.numel() for p in Student("resnet50").bottleneck.bn_layer.parameters())
    assert parameters > 1.5 * full


def test_student_sees_the_projection_and_the_map_compares_the_raw_teacher():
    model = RDPPModel(**TINY).eval()
    images = torch.rand(1, 3, 64, 64)
    teacher = model.teacher(images)
    student = model.student(model.project(teacher))
    expected = AnomalyMapGenerator()(teacher, student, (64, 64)).anomaly_map
    torch.testing.assert_close(model(images).anomaly_map, expected)


def test_training_features_equal_those_of_single_passes():
    model = RDPPModel(**TINY).train()
    images = torch.rand(2, 3, 64, 64)
    noisy = SimplexNoise()(images)
    both = model(images, noisy)
    for name, pixels in (("teacher", images), ("noisy_teacher", noisy)):
        for ours, expected in zip(getattr(both, name), model.teacher(pixels), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    for ours, expected in zip(both.noisy_projected, model.project(model.teacher(noisy)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_teacher_normalises_with_imagenet_statistics():
    teacher = Teacher("resnet18", pre_trained=False)
    images = torch.rand(1, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = teacher.network((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    for ours, theirs in zip(teacher(images), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# -- who learns


def test_teacher_stays_frozen_in_train_mode():
    model = RDPP(**TINY).train()
    before = {name: value.clone() for name, value in model.model.teacher.state_dict().items()}
    assert not model.model.teacher.training
    assert not model.model.teacher.network.training
    optimizer = model.configure_optimizers()
    model.loss(model.model(torch.rand(2, 3, 64, 64)))["loss"].backward()
    optimizer.step()
    for name, value in model.model.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_projection_and_student_get_gradients_and_their_learning_rates():
    model = RDPP(**TINY, projection_lr=0.1, student_lr=0.2).train()
    images = torch.rand(2, 3, 64, 64)
    model.loss(model.model(images, model.noise(images)))["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    groups = model.configure_optimizers().param_groups
    assert [group["lr"] for group in groups] == [0.1, 0.2]
    assert {group["betas"] for group in groups} == {(0.5, 0.999)}


def test_noisy_features_reach_the_projection_but_not_the_student():
    model = RDPPModel(**TINY).train()
    both = model(torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64))
    reconstruction_loss(both.noisy_projected, both.projected).backward()
    assert all(p.grad is not None for p in model.projections.parameters())
    assert all(p.grad is None for p in model.student.parameters())


def test_every_term_is_logged_by_name(tiny_data, tmp_path):
    from anomalib.engine import Engine

    engine = Engine(default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", devices=1, limit_val_batches=0)
    engine.fit(RDPP(**TINY, pre_processor=RDPP.configure_pre_processor((64, 64))), datamodule=tiny_data)
    names = ("distillation", "reconstruction", "contrast", "loss")
    logged = engine.trainer.callback_metrics.keys()
    assert {f"train_{name}" for name in names} == {name for name in logged if name.startswith("train_")}


# -- the loss


def test_terms_are_zero_for_equal_features():
    same = features()
    assert reconstruction_loss(same, same).abs() < 1e-5
    equal = [feature[:1].expand(3, -1, -1, -1) for feature in same]
    assert transport_loss(equal).abs() < 1e-5


@pytest.mark.parametrize("term", [reconstruction_loss, lambda a, b: contrast_loss(a, b, margin=-1.0)])
def test_terms_are_symmetric_and_free_of_scale(term):
    one, other = features(seed=1), features(seed=2)
    torch.testing.assert_close(term(one, other), term(other, one))
    torch.testing.assert_close(term([3 * f for f in one], other), term(one, other))


def test_transport_is_positive_for_different_images_and_free_of_scale():
    one = features()
    torch.manual_seed(0)
    loss = transport_loss(one, 1000)
    assert loss > 0.01
    torch.testing.assert_close(transport_loss([3 * feature for feature in one], 1000), loss, rtol=1e-3, atol=1e-5)


def test_transport_draws_positives_closer():
    cloud = [feature.requires_grad_() for feature in features()]
    before = transport_loss(cloud, 1000)
    before.backward()
    moved = [(feature - 3 * feature.grad).detach() for feature in cloud]
    assert transport_loss(moved, 1000) < before


def test_transport_of_a_single_image_is_zero():
    assert transport_loss(features(batch=1)) == 0


def test_transport_is_left_out_by_default():
    model = RDPP(**TINY)
    assert model.hparams.transport_weight == model.loss.weights["transport_weight"] == 0
    sames = RDPPFeatures(*[features(seed=i) for i in range(5)])
    terms = RDPPLoss()(sames)
    assert "transport" not in terms
    weighted = 0.2 * (0.01 * terms["reconstruction"] + 0.1 * terms["contrast"]) / 1.11
    torch.testing.assert_close(terms["loss"], terms["distillation"] + weighted)


@pytest.mark.parametrize(
    ("before", "weight"),
    [
        ({"transport": "published", "transport_weight": 1.0}, 0.0),
        ({"transport": "paper", "transport_weight": 0.5}, 0.5),
        ({"transport": "paper"}, 1.0),
        ({"transport": "paper", "transport_weight": 0.0}, 0.0),
        ({"transport_weight": 1.0}, 1.0),
        ({"layers": ["layer1", "layer2", "layer3"]}, 0.0),
    ],
)
def test_arguments_of_before_are_read(before, weight):
    assert RDPP(**TINY, **before).loss.weights["transport_weight"] == weight


def test_transport_is_in_the_loss_where_it_has_a_weight():
    sames = RDPPFeatures(*[features(seed=i) for i in range(5)])
    torch.manual_seed(0)
    terms = RDPPLoss(transport_weight=0.5)(sames)
    weighted = 0.2 * (0.01 * terms["reconstruction"] + 0.1 * terms["contrast"] + 0.5 * terms["transport"]) / 1.11
    torch.testing.assert_close(terms["loss"], terms["distillation"] + weighted)


def test_half_precision_features_give_a_float32_loss():
    with torch.autocast("cpu", torch.bfloat16):
        terms = RDPPLoss()(RDPPFeatures(*[[f.bfloat16() for f in features(seed=i)] for i in range(5)]))
    assert terms["loss"].dtype == torch.float32


# -- the map


def test_map_is_bilinear_upsampling_then_gaussian_blur():
    from scipy.ndimage import gaussian_filter

    teacher, student = features(1, 1), features(1, 2)
    raw = sum(
        functional.interpolate(
            (1 - functional.cosine_similarity(t, s))[None], (96, 64), mode="bilinear", align_corners=True
        )[0, 0]
        for t, s in zip(teacher, student, strict=True)
    )
    prediction = AnomalyMapGenerator()(teacher, student, (96, 64))
    expected = torch.from_numpy(gaussian_filter(raw.numpy(), 4))
    torch.testing.assert_close(prediction.anomaly_map[0, 0], expected, rtol=0, atol=1e-5)


def test_map_is_zero_for_equal_features():
    same = features()
    assert AnomalyMapGenerator()(same, same, (64, 64)).anomaly_map.abs().max() < 1e-5


def test_score_is_what_the_argument_says():
    teacher, student = features(2, 1), features(2, 2)
    whole = AnomalyMapGenerator()(teacher, student, (64, 64))
    pixels = whole.anomaly_map.flatten(1)
    expected = {
        "max": pixels.amax(1),
        "sum": pixels.sum(1),
        "top": pixels.sort(descending=True).values[:, :41].mean(1),  # 1 % of 4,096 pixels
    }
    coarsest = AnomalyMapGenerator()(teacher[-1:], student[-1:], (64, 64)).anomaly_map
    expected["coarse"] = coarsest.flatten(1).sort(descending=True).values[:, :41].mean(1)
    expected["standardised"] = expected["coarse"]  # of a student that knows no statistics
    for score, value in expected.items():
        prediction = AnomalyMapGenerator(score=score, score_fraction=0.01)(teacher, student, (64, 64))
        torch.testing.assert_close(prediction.pred_score, value)
        assert torch.equal(prediction.anomaly_map, whole.anomaly_map)


def test_standardised_features_count_in_the_score_alone():
    teacher, student, again = features(2, 1), features(2, 2), features(2, 3)
    generate = AnomalyMapGenerator(score="standardised")
    expected = [generate(teacher, each, (64, 64)) for each in (student, [*student[:2], again[2]])]
    found = generate([*teacher, teacher[2]], [*student, again[2]], (64, 64))
    assert torch.equal(found.anomaly_map, expected[0].anomaly_map)
    torch.testing.assert_close(found.pred_score, expected[0].pred_score + expected[1].pred_score)


def test_map_is_one_where_a_feature_is_zero():
    nothing, something = torch.zeros(1, 8, 8, 8), torch.ones(1, 8, 8, 8)
    for student in (nothing, something, 1e-30 * something):
        torch.testing.assert_close(AnomalyMapGenerator()([nothing], [student], (64, 64)).pred_score, torch.ones(1))


def test_distance_keeps_its_digits_in_bfloat16():
    from anomalib_rdpp.anomaly_map import _distance

    generator = torch.Generator().manual_seed(0)
    x, noise = torch.rand(2, 256, 8, 8, generator=generator), torch.randn(2, 256, 8, 8, generator=generator)
    x, y = x.bfloat16(), (x + 0.03 * noise).bfloat16()
    exact = 1 - torch.cosine_similarity(x.double(), y.double())
    assert exact.max() < 0.01, "as small as for normal images"
    torch.testing.assert_close(_distance(x, y).double(), exact, rtol=0.1, atol=0)
    plain = 1 - (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
    assert ((plain.double() - exact).abs() > 0.5 * exact).any(), "what it is for"


# -- the noise


def test_noise_fills_one_rectangle_of_each_image_with_another_field():
    difference = SimplexNoise()(torch.zeros(4, 3, 64, 64))
    for image in difference:
        rows, columns = (image.abs().sum(0).sum(axis).nonzero().flatten() for axis in (1, 0))
        assert 9 <= rows[-1] - rows[0] + 1 <= 31
        assert 9 <= columns[-1] - columns[0] + 1 <= 31
        assert image.abs().max() < 0.2 * 2.4
    assert not torch.equal(difference[0], difference[1])


def test_torch_seed_rules_the_noise():
    images, noise = torch.zeros(2, 3, 64, 64), SimplexNoise()
    torch.manual_seed(5)
    first = noise(images)
    assert not torch.equal(noise(images), first)
    torch.manual_seed(5)
    assert torch.equal(noise(images), first)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="CPUs can't be taken away here")
def test_process_with_one_cpu_ends_after_noise_and_a_fork():
    code = f"""
import os, runpy
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
import openvino, torch  # with its TBB, which numba would take
runpy.run_path({NOISE!r})["SimplexNoise"]()(torch.zeros(1, 3, 64, 64))
if os.fork() == 0:  # as a DataLoader does
    os._exit(0)
os.wait()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_noise_fits_an_image_smaller_than_its_patches():
    assert (SimplexNoise(patch_min=40, patch_max=50)(torch.zeros(1, 3, 32, 32)) != 0).float().mean() > 0.9


# -- what it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "median"}, "score must be one of max, top, coarse, standardised, sum, got 'median'"),
        ({"score": "top", "score_fraction": 0.0}, "score_fraction must be above 0 and at most 1, got 0.0"),
        ({"recipe": "slow"}, "recipe must be one of paper, fast, got 'slow'"),
        ({"projection": "heavy"}, "projection must be one of True, False, light, got 'heavy'"),
        ({"projection_weight": -1.0}, "projection_weight must be 0 or more and finite, got -1.0"),
        ({"contrast_weight": float("nan")}, "contrast_weight must be 0 or more"),
        ({"transport": "sinkhorn"}, "transport must be one of published, paper, got 'sinkhorn'"),
        ({"transport_positions": 0}, "transport_positions must be 1 or more"),
        ({"noise_patch_min": 40}, "0 < patch_min <= patch_max, got 40 and 31"),
    ],
)
def test_bad_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RDPP(**{**TINY, **arguments})


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 64, 64), "Expected RGB images of shape"),
        ((2, 4, 64, 64), "Expected RGB images of shape"),
        ((3, 64, 64), "Expected RGB images of shape"),
        ((2, 3, 64, 100), r"multiples of 32, got \(64, 100\); resize in the pre-processor, to 64 x 96"),
    ],
)
def test_bad_image_is_refused(shape, message, mode):
    with pytest.raises(ValueError, match=message):
        RDPPModel(**TINY).train(mode)(torch.rand(shape))


def test_batch_of_one_image_trains():
    model = RDPP(**TINY, transport_weight=1.0).train()
    terms = model.loss(model.model(torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64)))
    assert terms["transport"] == 0
    terms["loss"].backward()


def test_last_batch_of_one_trains(tiny_data, tmp_path):
    from anomalib.engine import Engine

    tiny_data.train_batch_size = 5
    engine = Engine(default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", devices=1, logger=False)
    engine.fit(RDPP(**TINY, pre_processor=RDPP.configure_pre_processor((64, 64))), datamodule=tiny_data)
    assert engine.trainer.global_step == 2


def test_image_with_nan_is_named():
    for value in (float("nan"), float("inf"), 200.0, -2.0):
        images = torch.rand(2, 3, 64, 64)
        images[1, 0, 5, 5] = value
        batch = ImageBatch(image=images, image_path=["good.png", "bad.png"])
        with pytest.raises(ValueError, match=r"outside of \[0, 1\] in \['bad.png'\]"):
            RDPP(**TINY).on_before_batch_transfer(batch, 0)


def test_normalising_pre_processor_is_refused():
    transform = Compose([Resize((64, 64)), Normalize([0.5] * 3, [0.5] * 3)])
    with pytest.raises(ValueError, match="take Normalize out of the transform"):
        RDPP(**TINY, pre_processor=PreProcessor(transform)).setup("fit")


# -- checkpoints


def test_checkpoint_of_another_backbone_is_named():
    with pytest.raises(ValueError, match="RDPP with backbone 'resnet50', this model has 'resnet18'"):
        RDPP(**RESNET).on_load_checkpoint({"hyper_parameters": {"backbone": "resnet50.tv_in1k"}})
    RDPP(**RESNET).on_load_checkpoint({"hyper_parameters": {"backbone": "resnet18.tv_in1k"}})


def test_checkpoint_brings_its_score():
    """Its thresholds are of that scale."""
    model = RDPP(**RESNET)
    with pytest.warns(UserWarning, match="score is sum, as in the checkpoint"):
        model.on_load_checkpoint({"hyper_parameters": {**model.hparams, "score": "sum"}})
    assert model.model.anomaly_map_generator.score == model.hparams.score == "sum"


def test_checkpoint_of_before_any_teacher_loads():
    model, again = RDPP(**RESNET).eval(), RDPP(**RESNET).eval()
    state = {
        key.replace("teacher.network.", "teacher.extractor.feature_extractor."): value
        for key, value in model.state_dict().items()
        if not key.endswith(("teacher.mean", "teacher.std"))
    }
    again.load_state_dict(state)
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(again.model(images).anomaly_map, model.model(images).anomaly_map)


def test_checkpoint_without_projection_is_named():
    with pytest.raises(ValueError, match="RDPP with projection 'False', this model has 'True'"):
        RDPP(**RESNET).on_load_checkpoint({"hyper_parameters": {"backbone": "resnet18", "projection": False}})


@pytest.mark.parametrize(
    ("theirs", "ours"), [("coarse", "standardised"), ("standardised", "top"), ("max", "standardised")]
)
def test_checkpoint_of_a_student_that_learnt_otherwise_is_named(theirs, ours):
    stored = {"backbone": "resnet18"} | ({} if theirs == "max" else {"score": theirs})  # max before there was a choice
    with pytest.raises(ValueError, match=f"RDPP with score '{theirs}', this model has '{ours}'"):
        RDPP(**RESNET, score=ours).on_load_checkpoint({"hyper_parameters": stored})


def test_checkpoint_of_another_model_is_named():
    from anomalib_rdpp import AAND

    state = AAND(**RESNET).state_dict()
    message = r"holds .*'amplifiers'.*of another model than RDPP, which has .*'projections'"
    with pytest.raises(ValueError, match=message):
        RDPP(**RESNET).on_load_checkpoint({"state_dict": state, "hyper_parameters": {"backbone": "resnet18"}})


def test_projection_has_the_papers_widths():
    widths = [layer.out_channels for layer in Projection(64) if hasattr(layer, "out_channels")]
    assert widths == [32, 16, 32, 64]


def test_noise_leaves_torch_its_threads():
    code = f"""
import runpy, torch
torch.set_num_threads(1)
runpy.run_path({NOISE!r})["SimplexNoise"]()(torch.zeros(1, 3, 64, 64))
print(torch.get_num_threads())
"""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), "2")  # tests have one, and nothing to turn up
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **threads},
    )
    assert ended.stdout.strip() == "1"
