"""Losses of AAND: invariants, empty cases, bad input."""

import pytest
import torch

from anomalib_rdpp.aand.loss import AANDLoss, amplification_loss, focal_loss, hard_knowledge_loss
from anomalib_rdpp.aand.torch_model import AmplifierFeatures, StudentFeatures


def scales(requires_grad=False):
    return [torch.randn(2, 8, side, side, requires_grad=requires_grad) for side in (16, 8, 4)]


def square():
    mask = torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    mask[..., 16:48, 16:48] = True
    return mask


def test_focal_loss_is_smaller_the_better_the_gate():
    mask = square()
    losses = [focal_loss([mask.float() * (high - low) + low], mask) for low, high in ((0, 1), (0.2, 0.8), (0.5, 0.5))]
    assert losses[0] < 1e-6
    assert losses[0] < losses[1] < losses[2]


def test_focal_loss_of_a_saturated_wrong_gate_is_finite():
    gate = (~square()).float().requires_grad_()
    loss = focal_loss([gate], square())
    loss.backward()
    assert loss.isfinite()
    assert gate.grad.isfinite().all()


def test_focal_loss_without_gates_is_zero():
    assert focal_loss([], square()) == 0


def test_amplification_loss_of_unchanged_features_is_the_margin_at_each_scale():
    teacher = scales()
    loss = amplification_loss(teacher, teacher, square(), torch.ones(2, 1, 64, 64))
    torch.testing.assert_close(loss, torch.tensor(0.9))


def test_amplification_loss_is_zero_once_anomalies_are_far_enough():
    teacher = [feature.abs() + 1 for feature in scales()]
    assert amplification_loss(teacher, [-feature for feature in teacher], square(), torch.ones(2, 1, 64, 64)) == 0


def test_amplification_loss_ignores_the_background():
    teacher, amplified = scales(), scales()
    foreground = torch.ones(2, 1, 64, 64)
    foreground[..., :16] = 0
    loss = amplification_loss(teacher, amplified, square(), foreground)
    for feature in teacher:
        feature[..., : feature.shape[-1] // 4] = 7
    torch.testing.assert_close(amplification_loss(teacher, amplified, square(), foreground), loss)


def test_amplification_loss_draws_from_torch_generator():
    teacher, amplified = scales(), scales()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(amplification_loss(teacher, amplified, square(), torch.ones(2, 1, 64, 64), 0.3, 10, 5))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("mask", "foreground"),
    [
        (torch.zeros(2, 1, 64, 64), torch.ones(2, 1, 64, 64)),  # no anomaly
        (torch.ones(2, 1, 64, 64), torch.ones(2, 1, 64, 64)),  # no normal position
        (square(), square()),  # no normal foreground
    ],
)
def test_amplification_loss_without_pairs_is_zero_with_gradients(mask, foreground):
    amplified = scales(requires_grad=True)
    loss = amplification_loss(scales(), amplified, mask, foreground)
    loss.backward()
    assert loss == 0
    assert all((feature.grad == 0).all() for feature in amplified)


def test_amplification_loss_skips_a_scale_that_an_anomaly_is_too_small_for():
    mask = torch.zeros(2, 1, 64, 64)
    mask[..., :4, :4] = 1  # one position of the finest scale, a quarter of one at the next
    teacher = scales()
    torch.testing.assert_close(amplification_loss(teacher, teacher, mask, torch.ones_like(mask)), torch.tensor(0.3))


def test_hard_knowledge_loss_is_zero_for_equal_directions():
    features = scales()
    torch.testing.assert_close(hard_knowledge_loss(features, [3 * feature for feature in features]), torch.tensor(0.0))


def test_hard_knowledge_loss_looks_at_the_worst_positions():
    teacher = [torch.ones(1, 8, 8, 8)]
    student = [torch.ones(1, 8, 8, 8)]
    student[0][..., :2, :5] *= -1  # 10 positions
    torch.testing.assert_close(hard_knowledge_loss(teacher, student, 10), torch.tensor(2.0))
    torch.testing.assert_close(hard_knowledge_loss(teacher, student, 20), torch.tensor(1.0))


def test_hard_knowledge_loss_takes_all_positions_of_a_small_feature():
    teacher, student = [torch.randn(2, 8, 2, 2)], [torch.randn(2, 8, 2, 2)]
    expected = (1 - torch.cosine_similarity(teacher[0], student[0])).mean()
    torch.testing.assert_close(hard_knowledge_loss(teacher, student, 10), expected)


def test_stage_one_names_and_weighs_its_terms():
    gates = [torch.rand(2, 1, side, side) for side in (16, 8, 4)]
    features = AmplifierFeatures(scales(), scales(), gates)
    terms = AANDLoss(amplification_weight=0.5)(features, square(), torch.ones(2, 1, 64, 64))
    assert terms.keys() == {"focal", "amplification", "loss"}
    torch.testing.assert_close(terms["loss"], terms["focal"] + 0.5 * terms["amplification"])


def test_stage_two_names_and_weighs_its_terms():
    terms = AANDLoss(hard_weight=0)(StudentFeatures(scales(), scales()))
    assert terms.keys() == {"distillation", "hard", "loss"}
    torch.testing.assert_close(terms["loss"], terms["distillation"])


def test_loss_is_computed_in_full_precision_under_autocast():
    features = StudentFeatures(scales(), scales())
    expected = AANDLoss()(features)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(AANDLoss()(features)["loss"], expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"amplification_weight": -1},
        {"amplification_weight": float("nan")},
        {"hard_weight": -0.1},
        {"hard_positions": 0},
    ],
)
def test_bad_weights_are_refused_by_name(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        AANDLoss(**arguments)
