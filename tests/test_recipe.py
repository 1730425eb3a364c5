"""The fast recipe: its schedule ends where training ends, and learnt positions get little gradient."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from anomalib.engine import Engine
from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer

from anomalib_rdpp import AAND, RDPP
from anomalib_rdpp.recipe import cosine_factor, easy_share, focus_on_hard, training_progress

TINY = {"backbone": "test_resnet", "pre_trained": False, "width": 0.25}


class Rates(Callback):
    """Note progress and rates before each step."""

    def __init__(self):
        self.progress, self.rates = [], []

    def on_train_batch_start(self, trainer, *_):
        self.progress.append(training_progress(trainer))
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def fit(model_class, data, folder, ckpt_path=None, callbacks=(), **options):
    rates = Rates()
    engine = Engine(
        default_root_dir=folder, accelerator="cpu", devices=1, logger=False, callbacks=[*callbacks, rates], **options
    )
    model = model_class(**TINY, recipe="fast", pre_processor=model_class.configure_pre_processor((64, 64)))
    engine.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return engine, model, rates


def test_schedule_warms_up_and_falls_to_nearly_nothing():
    assert cosine_factor(0.0) == 0.02
    assert cosine_factor(0.05) == pytest.approx(0.5)
    assert cosine_factor(0.1) == pytest.approx(1)
    assert cosine_factor(0.55) == pytest.approx(0.51)
    assert cosine_factor(1.0) == pytest.approx(0.02)
    assert [easy_share(progress) for progress in (0, 0.1, 0.2, 1)] == pytest.approx([0, 0.45, 0.9, 0.9])


@pytest.mark.parametrize(
    ("model_class", "clip", "is_fused"), [(RDPP, None, True), (RDPP, 0.1, False), (AAND, 0.1, False)]
)
def test_gradients_are_clipped_under_mixed_precision(model_class, clip, is_fused, tiny_data, tmp_path):
    options = {"max_epochs": 2, "limit_train_batches": 1, "limit_val_batches": 0, "precision": "bf16-mixed"}
    trainer = fit(model_class, tiny_data, tmp_path, **options, gradient_clip_val=clip)[0].trainer
    assert trainer.global_step == 2
    assert trainer.optimizers[0].defaults["fused"] == is_fused


def test_learnt_positions_get_a_tenth_of_their_gradient_and_the_loss_stays():
    generator = torch.Generator().manual_seed(0)
    target = [torch.randn(2, 8, 4, 4, generator=generator)]
    student = [(target[0] + torch.randn(2, 8, 4, 4, generator=generator)).requires_grad_()]
    loss = ReverseDistillationLoss()
    focused = loss(target, focus_on_hard(student, target, 0.75))
    assert torch.equal(focused, loss(target, student))
    (full,), (less,) = (torch.autograd.grad(each, student) for each in (loss(target, student), focused))
    ratio = less.norm(dim=1) / full.norm(dim=1)
    distance = 1 - torch.cosine_similarity(student[0], target[0])
    is_easy = distance <= distance.flatten().sort().values[23]
    torch.testing.assert_close(ratio, torch.where(is_easy, 0.1, 1.0), rtol=1e-3, atol=1e-3)
    assert focus_on_hard(student, target, 0.0) is student


def test_progress_is_that_of_what_ends_the_training_first():
    trainer = SimpleNamespace(estimated_stepping_batches=10, global_step=3, callbacks=[], world_size=1)
    assert training_progress(trainer) == pytest.approx(0.3)
    timer = Timer(duration=timedelta(seconds=100))
    timer.time_elapsed, timer.time_remaining = (lambda: 80.0), (lambda: 20.0)
    trainer.callbacks = [timer]
    assert training_progress(trainer) == pytest.approx(0.8)
    trainer.estimated_stepping_batches = float("inf")
    trainer.callbacks = []
    assert training_progress(trainer) == 0
    for total in (0, -1):  # nothing to do; a stream of data without a length
        trainer.estimated_stepping_batches, trainer.current_epoch, trainer.max_epochs = total, 3, 4
        assert training_progress(trainer) == (0 if total == 0 else 0.75)


def test_resumed_training_lands_on_the_curve(tiny_data, tmp_path):
    _, _, whole = fit(RDPP, tiny_data, tmp_path / "whole", max_epochs=4)
    assert [rates[1] for rates in whole.rates] == pytest.approx(
        [0.002 * cosine_factor(progress) for progress in whole.progress]
    )
    assert whole.rates[0][0] == pytest.approx(0.0005 * 0.02)

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, *_):
            trainer.should_stop = trainer.current_epoch == 1

    first = Engine(
        default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False, max_epochs=4, callbacks=[Stop()]
    )
    model = RDPP(**TINY, recipe="fast", pre_processor=RDPP.configure_pre_processor((64, 64)))
    first.fit(model, datamodule=tiny_data)
    path = first.trainer.checkpoint_callback.best_model_path
    _, _, rest = fit(RDPP, tiny_data, tmp_path / "rest", ckpt_path=path, max_epochs=4)
    assert rest.rates == [pytest.approx(rates) for rates in whole.rates[4:]]


class Clock(Timer):
    """A timer of ten seconds, of which each step takes one."""

    trainer = SimpleNamespace(global_step=0)

    def on_train_start(self, trainer, *args, **kwargs):
        self.trainer = trainer
        super().on_train_start(trainer, *args, **kwargs)

    def time_elapsed(self, *_):
        return float(self.trainer.global_step)

    def time_remaining(self, *_):
        return 10.0 - self.trainer.global_step


@pytest.mark.parametrize("model_class", [RDPP, AAND])
def test_time_is_the_clock_where_it_ends_the_training(model_class, tiny_data, tmp_path):
    engine, model, rates = fit(
        model_class, tiny_data, tmp_path, max_epochs=-1, callbacks=[Clock(timedelta(seconds=10))]
    )
    assert engine.trainer.global_step == 10
    assert rates.progress == pytest.approx([step / 10 for step in range(10)])
    if model_class is RDPP:
        assert rates.rates == [pytest.approx([0.0005 * f, 0.002 * f]) for f in map(cosine_factor, rates.progress)]
    else:
        amplifier, student = zip(*rates.rates, strict=True)
        assert max(amplifier) > 10 * amplifier[-1], "stage one came to its end"
        assert not model.model.is_amplifying, "stage two had its share of the time"
        assert max(student) > 3 * student[-1]
