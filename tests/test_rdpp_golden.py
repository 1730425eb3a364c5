"""RD++ against the values that the official code gives on small inputs."""

import numpy as np
import pytest
import torch
from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss

from anomalib_rdpp.anomaly_map import AnomalyMapGenerator
from anomalib_rdpp.rdpp.loss import RDPPLoss, contrast_loss, reconstruction_loss
from anomalib_rdpp.rdpp.torch_model import Projection, RDPPFeatures
from anomalib_rdpp.synthesis.noise import simplex_noise


def assert_close(actual, expected, rtol=1e-5):
    """Largest difference within ``rtol`` of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def assert_gradients(tensors, expected):
    for tensor, gradient in zip(tensors, expected, strict=True):
        assert_close(tensor.grad, gradient)


@pytest.mark.parametrize(("scale", "letter"), list(enumerate("abc")))
def test_projection_equals_the_published_one(golden, scale, letter):
    values = golden("rdpp_projection")
    projection = Projection(16 * 2**scale)
    prefix = f"w.proj_{letter}.proj."
    names = [name for name in values.arrays.files if name.startswith(prefix)]
    projection.load_state_dict({name.removeprefix(prefix): values[name] for name in names})
    assert_close(projection(values[f"in{scale}"]), values[f"out{scale}"])


def test_reconstruction_and_contrast_equal_the_published_ones(golden):
    values = golden("rdpp_projection_loss")
    noisy, normal = values.scales("projected_noisy"), values.scales("projected_normal")
    assert_close(reconstruction_loss(noisy, normal), values["reconstruct"].float())
    assert contrast_loss(values.scales("noisy_feature"), normal) == 0


def test_projection_loss_and_gradients_equal_the_published_ones(golden):
    values = golden("rdpp_projection_loss")
    noisy, normal = (values.scales(f"projected_{kind}", requires_grad=True) for kind in ("noisy", "normal"))
    noisy_teacher = values.scales("noisy_feature")
    features = RDPPFeatures(noisy_teacher, noisy_teacher, normal, noisy, noisy_teacher)
    terms = RDPPLoss(projection_weight=1)(features)
    loss = terms["loss"] - terms["distillation"]
    assert_close(loss, values["total"].float())
    loss.backward()
    assert_gradients(noisy, values.scales("grad_projected_noisy"))
    assert_gradients(normal, values.scales("grad_projected_normal"))


def test_contrast_past_its_margin_equals_the_published_one(golden):
    values = golden("rdpp_contrast_active")
    normal = values.scales("projected_normal", requires_grad=True)
    loss = contrast_loss(values.scales("noisy_feature"), normal)
    assert_close(loss, values["contrast"].float())
    loss.backward()
    assert_gradients(normal, values.scales("grad_projected_normal"))


def test_distillation_loss_equals_the_published_one(golden):
    values = golden("rd_distillation_loss")
    student = values.scales("student", requires_grad=True)
    loss = ReverseDistillationLoss()(values.scales("teacher"), student)
    assert_close(loss, values["loss"].float())
    loss.backward()
    assert_gradients(student, values.scales("grad_student"))


def test_map_and_score_equal_the_published_ones_up_to_the_border(golden):
    values = golden("rd_anomaly_map")
    prediction = AnomalyMapGenerator()(values.scales("teacher"), values.scales("student"), (64, 64))
    torch.testing.assert_close(prediction.anomaly_map[0, 0], values["smoothed"].float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(prediction.pred_score[0], values["score"].float(), rtol=0, atol=1e-5)


def test_simplex_noise_equals_the_published_one(golden):
    values = golden("rdpp_simplex_noise").arrays
    noise = simplex_noise(
        values["noise"].shape,
        int(values["seed"]),
        int(values["octaves"]),
        float(values["persistence"]),
        int(values["frequency"]),
    )
    np.testing.assert_allclose(noise, values["noise"], rtol=0, atol=1e-15)
