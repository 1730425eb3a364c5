"""Nothing trained is lost, whatever ends the training; what can be watched is never NaN."""

import signal
import warnings

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from anomalib_rdpp import AAND, RDPP


def build(model_class=RDPP):
    resize = model_class.configure_pre_processor((64, 64))
    return model_class("test_resnet", pre_trained=False, pre_processor=resize, evaluator=False, visualizer=False)


@pytest.fixture
def data(tiny_folder):
    """Two steps per epoch; defects come first in validation, as their folder does in name order."""
    return Folder(
        name="tiny",
        root=tiny_folder,
        normal_dir="train/good",
        normal_test_dir="test/square",
        abnormal_dir="test/good",
        val_split_mode="same_as_test",
        train_batch_size=3,
        eval_batch_size=4,
        num_workers=0,
    )


@pytest.fixture
def fit(tmp_path, data):
    """Train; give the engine."""

    def train(model, **options):
        engine = Engine(accelerator="cpu", devices=1, default_root_dir=tmp_path, enable_progress_bar=False, **options)
        engine.fit(model, datamodule=data)
        return engine

    return train


class Interrupt(Callback):
    def on_train_batch_end(self, *args):  # noqa: ARG002
        raise KeyboardInterrupt


class Terminate(Callback):
    """What Lightning's handler of SIGTERM does; the signal itself would end a test process without it."""

    def on_train_batch_end(self, trainer, *_):
        trainer._signal_connector.received_sigterm = True


def assert_last_state_is_stored(model, folder, data):
    """The one checkpoint holds the model's state, and its thresholds are those of this state."""
    [path] = folder.rglob("*.ckpt")
    stored = torch.load(path, weights_only=False)["state_dict"]
    thresholds = [stored[f"post_processor.{name}"] for name in ("_image_threshold", "image_min", "pixel_max")]
    assert not torch.stack(thresholds).isnan().any()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(stored[name], value, rtol=0, atol=0, equal_nan=True, msg=name)
    Engine(accelerator="cpu", devices=1, default_root_dir=folder, enable_progress_bar=False).validate(
        model, datamodule=data
    )
    for name, value in zip(("_image_threshold", "image_min", "pixel_max"), thresholds, strict=True):
        torch.testing.assert_close(getattr(model.post_processor, name), value)


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 3, "check_val_every_n_epoch": 2, "limit_train_batches": 1},
        {"max_steps": 1},
        {"max_epochs": 9, "check_val_every_n_epoch": 5, "max_time": {"milliseconds": 1}},
        {
            "max_epochs": 9,
            "check_val_every_n_epoch": 5,
            "limit_train_batches": 1,
            "callbacks": [EarlyStopping("train_loss", stopping_threshold=1e9, check_on_train_epoch_end=True)],
        },
        {"max_epochs": 9, "num_sanity_val_steps": 0, "callbacks": [Interrupt()]},
        {"max_epochs": 9, "check_val_every_n_epoch": 5, "callbacks": [Terminate()]},
    ],
    ids=["epochs", "steps", "time", "early_stopping", "ctrl_c", "sigterm"],
)
def test_what_is_stored_is_what_was_trained_last(fit, data, tmp_path, options):
    model = build()
    try:
        fit(model, **options)
    except (SystemExit, SIGTERMException):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning has switched it off
    assert_last_state_is_stored(model, tmp_path, data)


def test_checkpoints_that_a_user_selects_stay_as_they_are(fit, tmp_path):
    best = ModelCheckpoint(tmp_path, "best", monitor="train_loss", mode="min", save_on_train_epoch_end=True)
    numbered = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1)
    model = build()
    fit(model, max_epochs=2, check_val_every_n_epoch=5, limit_train_batches=1, callbacks=[best, numbered])
    files = {path.name: torch.load(path, weights_only=False) for path in tmp_path.rglob("*.ckpt")}
    assert set(files) == {"best.ckpt", "step=2.ckpt", "model.ckpt"}
    thresholds = {name: float(file["state_dict"]["post_processor._image_threshold"]) for name, file in files.items()}
    assert thresholds["model.ckpt"] == float(model.post_processor.image_threshold)
    assert thresholds["best.ckpt"] == thresholds["step=2.ckpt"] != thresholds["model.ckpt"]


def test_aand_stopped_in_stage_one_says_so(fit):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(SystemExit):
            fit(build(AAND), max_epochs=4, limit_val_batches=0, callbacks=[Interrupt()])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert any("AAND WAS STOPPED IN STAGE ONE" in str(each.message) for each in said)


def test_validation_without_normal_images_is_named_where_its_distance_is_watched(fit):
    with pytest.raises(ValueError, match=r"EarlyStopping watches val_distance.*the images validated hold none"):
        fit(build(), max_epochs=1, limit_val_batches=0.5, callbacks=[EarlyStopping("val_distance")])


def test_distance_is_a_number_where_only_some_batches_have_normal_images(fit):
    engine = fit(build(), max_epochs=1, callbacks=[EarlyStopping("val_distance")])
    assert engine.trainer.callback_metrics["val_distance"].isfinite()


class Fail(Callback):
    """Fail in the second step, or in the validation at the end."""

    def __init__(self, hook):
        setattr(self, hook, self.fail)

    def fail(self, trainer, *_):
        if trainer.global_step:
            message = "out of memory"
            raise RuntimeError(message)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_batch_start"])
def test_what_was_trained_is_stored_whatever_fails(fit, tmp_path, hook):
    model = build()
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(model, max_epochs=2, check_val_every_n_epoch=5, num_sanity_val_steps=0, callbacks=[Fail(hook)])
    [path] = tmp_path.rglob("*.ckpt")
    stored = torch.load(path, weights_only=False)
    assert stored["global_step"] == (1 if hook == "on_train_batch_start" else 4)
    weights = {name: value for name, value in model.state_dict().items() if name.startswith("model.student")}
    for name, value in weights.items():
        torch.testing.assert_close(stored["state_dict"][name], value, rtol=0, atol=0)


def test_resuming_what_is_complete_says_that_nothing_was_trained(fit, data, tmp_path):
    engine = fit(build(), max_epochs=1)
    [path] = tmp_path.rglob("*.ckpt")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        engine.fit(build(), datamodule=data, ckpt_path=path)
    assert any("Nothing was trained: max_epochs 1 or max_steps -1 is reached" in str(each.message) for each in said)


def test_model_without_validation_says_that_it_has_no_thresholds(fit, caplog):
    with caplog.at_level("INFO"):
        fit(build(), max_epochs=1, limit_val_batches=0)
    assert "Without validation the model has no thresholds" in caplog.text
