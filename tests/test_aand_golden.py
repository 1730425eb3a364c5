"""AAND against the values that the official code gives on small inputs."""

import torch

from anomalib_rdpp.aand.amplifier import Amplifier, position_encoding
from anomalib_rdpp.aand.loss import AANDLoss, amplification_loss, focal_loss
from anomalib_rdpp.aand.torch_model import StudentFeatures


def assert_close(actual, expected, rtol=1e-5):
    """Largest difference within ``rtol`` of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def assert_gradients(tensors, expected):
    for tensor, gradient in zip(tensors, expected, strict=True):
        assert_close(tensor.grad, gradient)


def published_amplifier(values):
    """Amplifier of 16 channels with the official code's weights."""
    amplifier = Amplifier(16)
    names = {"gate.query": "w.projs.0", "generator": "w.projs2.0"}
    weights = {f"{ours}.{key}": values[f"{theirs}.{key}"] for ours, theirs in names.items() for key in layers()}
    amplifier.load_state_dict({**weights, "gate.keys": values["w.K_list.0"][0]})
    return amplifier


def layers():
    return [f"{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]


def test_position_encoding_equals_the_published_one(golden):
    values = golden("aand_raa")
    assert_close(torch.from_numpy(position_encoding(16, 8, 8)), values["positional_encoding"])


def test_gate_and_residual_equal_the_published_ones(golden):
    values = golden("aand_raa")
    feature = values["feature"]
    amplified, gate = published_amplifier(values)(feature)
    assert_close(gate.flatten(1), values["gate"][..., 0])
    assert_close(amplified - feature, values["residual"])


def test_focal_loss_and_gradients_equal_the_published_ones(golden):
    values = golden("aand_stage_one_loss")
    columns = values.scales("gate", requires_grad=True)  # (B, H * W, 1)
    gates = [
        column.transpose(1, 2).unflatten(2, (side, side)) for column, side in zip(columns, (64, 32, 16), strict=True)
    ]
    loss = focal_loss(gates, values["mask"])
    assert_close(loss, values["focal"])
    loss.backward()
    assert_gradients(columns, values.scales("grad_gate"))


def test_amplification_loss_and_gradients_equal_the_published_ones(golden):
    values = golden("aand_amplify_all_patches")
    amplified = values.scales("amplified", requires_grad=True)
    mask = values["mask"]
    loss = amplification_loss(values.scales("pretrained"), amplified, mask, torch.ones_like(mask))
    assert_close(loss, values["amplify"])
    loss.backward()
    assert_gradients(amplified, values.scales("grad_amplified"))


def test_amplification_loss_of_all_positions_comes_close_to_the_published_draw(golden):
    values = golden("aand_stage_one_loss")
    scales = values.scales("pretrained"), values.scales("amplified")
    masks = values["mask"], values["foreground"]
    assert_close(amplification_loss(*scales, *masks, normal_positions=10**6), values["amplify"])
    assert_close(amplification_loss(*scales, *masks), values["amplify"], rtol=1e-3)


def test_normality_loss_and_gradients_equal_the_published_ones(golden):
    values = golden("aand_hkd_loss")
    student = values.scales("student", requires_grad=True)
    loss = AANDLoss(hard_positions=int(values["top_k"]))(StudentFeatures(values.scales("teacher"), student))["loss"]
    assert_close(loss, values["loss"])
    loss.backward()
    assert_gradients(student, values.scales("grad_student"))
