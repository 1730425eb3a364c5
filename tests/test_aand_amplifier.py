"""What an amplifier does to features, whatever its weights."""

import pytest
import torch
from tiny import TINY

from anomalib_rdpp.aand.amplifier import Amplifier, MatchingGate, position_encoding
from anomalib_rdpp.aand.torch_model import AANDModel, mask_at_scale


def test_position_encoding_of_an_oblong_feature_goes_along_width_then_height():
    encoding = torch.from_numpy(position_encoding(8, 3, 5))
    assert encoding.shape == (8, 3, 5)
    x, y = torch.arange(5.0).expand(3, 5), torch.arange(3.0)[:, None].expand(3, 5)
    expected = [wave(place * rate) for place in (x, y) for rate in (1, 0.01) for wave in (torch.sin, torch.cos)]
    torch.testing.assert_close(encoding, torch.stack(expected))


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (1, 1)])
def test_gate_is_a_share_at_every_position(size):
    gate = MatchingGate(16)(torch.randn(2, 16, *size))
    assert gate.shape == (2, 1, *size)
    assert ((gate > 0) & (gate < 1)).all()


def test_gate_opens_with_the_anomalous_keys():
    matching, position = MatchingGate(16), torch.from_numpy(position_encoding(16, 1, 1))
    with torch.no_grad():
        matching.keys[50:] = matching.query(position[None]).flatten()
        matching.keys[:50] = -matching.keys[50:]
    assert matching(torch.zeros(1, 16, 1, 1)) > 0.99


def test_residual_scales_each_attribute_by_at_most_its_own_size():
    feature = 5 * torch.randn(2, 16, 8, 8)
    amplified, _ = Amplifier(16)(feature)
    assert ((amplified - feature).abs() <= feature.abs()).all()


def test_mask_takes_the_place_of_the_gate():
    feature, mask = torch.randn(2, 16, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    mask[:, :, 2:4] = True
    amplified, gate = Amplifier(16)(feature, mask)
    changed = (amplified != feature).any(dim=1, keepdim=True)
    assert torch.equal(changed, mask)
    assert gate.requires_grad, "the gate is computed all the same, for its own loss"


def test_without_gate_the_residual_goes_everywhere():
    feature = torch.randn(2, 16, 8, 8)
    amplifier = Amplifier(16, is_gated=False)
    amplified, gate = amplifier(feature, torch.zeros(2, 1, 8, 8))
    assert gate is None
    torch.testing.assert_close(amplified, feature + torch.tanh(amplifier.generator(feature)) * feature)


def test_fixed_scale_stands_in_for_the_generator():
    feature, mask = torch.randn(2, 16, 8, 8), torch.ones(2, 1, 8, 8)
    amplifier = Amplifier(16, fixed_scale=0.5)
    torch.testing.assert_close(amplifier(feature, mask)[0], 1.5 * feature)
    assert amplifier.generator is None


def test_neither_gate_nor_generator_is_refused():
    with pytest.raises(ValueError, match="nothing is left to train"):
        Amplifier(16, is_gated=False, fixed_scale=1.0)


def test_mask_is_set_where_more_than_three_tenths_of_its_pixels_are():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :1, :4] = 1  # 4 of 16 pixels
    mask[..., 4:6, 4:7] = 1  # 6 of 16 pixels
    assert mask_at_scale(mask, torch.empty(1, 3, 2, 2)).tolist() == [[[[False, False], [False, True]]]]


@pytest.mark.parametrize(("arguments", "gate_count"), [({}, 3), ({"is_gated": False}, 0), ({"fixed_scale": 0.5}, 3)])
def test_model_of_every_ablation_trains_both_stages(arguments, gate_count):
    model = AANDModel(**TINY, **arguments).train()
    images, masks = torch.rand(2, 3, 64, 96), torch.ones(2, 1, 64, 96)
    model.start_stage(is_amplifying=True)
    teacher, amplified, gates = model(images, masks)
    assert [feature.shape for feature in amplified] == [feature.shape for feature in teacher]
    assert len(gates) == gate_count
    model.start_stage(is_amplifying=False)
    amplified, student = model(images)
    assert [feature.shape for feature in amplified] == [feature.shape for feature in student]


def test_backbone_goes_on_from_raw_features():
    model = AANDModel(**TINY)
    model.start_stage(is_amplifying=True)
    images = torch.rand(2, 3, 64, 64)
    for raw, expected in zip(
        model.train()(images, torch.ones(2, 1, 64, 64)).teacher, model.teacher(images), strict=True
    ):
        assert torch.equal(raw, expected)
