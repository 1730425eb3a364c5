"""The two stages of AAND: what runs when, what is frozen, what a checkpoint brings back."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
import tiny
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import ImageBatch
from lightning.pytorch import Callback
from onnx import helper
from tiny import TINY

from anomalib_rdpp.aand.lightning_model import AAND, learning_rate_factor, split_epochs
from anomalib_rdpp.aand.torch_model import AANDModel


def build(**arguments):
    return tiny.build("AAND", anomaly_probability=arguments.pop("anomaly_probability", 1.0), **arguments)


def engine(folder, *callbacks, **arguments):
    return tiny.engine(folder, *callbacks, **{"max_epochs": 4, "limit_val_batches": 0, **arguments})


class Diary(Callback):
    """Note stage, learning rates and what was trained, epoch by epoch."""

    def __init__(self) -> None:
        self.epochs, self.stages, self.rates, self.metrics, self.states = [], [], [], [], []

    def on_train_start(self, trainer, pl_module):
        del trainer
        self.states.append(snapshot(pl_module))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        del pl_module, batch, batch_idx
        self.rate = [group["lr"] for group in trainer.optimizers[0].param_groups]

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(trainer.current_epoch)
        self.stages.append(1 if pl_module.model.is_amplifying else 2)
        self.rates.append(self.rate)
        self.metrics.append(dict(trainer.callback_metrics))
        self.states.append(snapshot(pl_module))

    def changed(self, epoch, part):
        before, after = self.states[epoch : epoch + 2]
        return any(not torch.equal(before[key], after[key]) for key in before if key.startswith(part))


def snapshot(module):
    return {key: value.clone() for key, value in module.model.state_dict().items()}


def gradients(model):
    return {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_stage_one_reaches_the_amplifiers_only():
    module = build()
    module.model.start_stage(is_amplifying=True)
    images, mask, foreground = module.anomalies(torch.rand(2, 3, 64, 64))
    module.loss(module.model.train()(images, mask), mask, foreground)["loss"].backward()
    assert gradients(module.model) == {"amplifiers"}
    assert all(p.grad is not None for p in module.model.amplifiers.parameters()), "DDP waits for all"


def test_stage_two_reaches_the_student_only():
    module = build()
    module.model.start_stage(is_amplifying=False)
    module.loss(module.model.train()(torch.rand(2, 3, 64, 64)))["loss"].backward()
    assert gradients(module.model) == {"student"}
    assert all(p.grad is not None for p in module.model.student.parameters() if p.requires_grad), "DDP waits for all"


@pytest.mark.parametrize("is_amplifying", [True, False])
def test_what_a_stage_does_not_train_is_in_eval_mode(is_amplifying):
    model = AANDModel(**TINY)
    model.start_stage(is_amplifying)
    model.eval().train()
    assert not model.teacher.training
    assert all(module.training == is_amplifying for module in model.amplifiers.modules())
    assert all(module.training != is_amplifying for module in model.student.modules())


def test_stages_follow_each_other_in_one_fit_with_the_rest_frozen(tiny_data, tmp_path):
    diary = Diary()
    engine(tmp_path, diary).fit(build(amplifier_share=0.5), datamodule=tiny_data)
    assert diary.stages == [1, 1, 2, 2]
    assert [diary.changed(epoch, "amplifiers") for epoch in range(4)] == [True, True, False, False]
    assert [diary.changed(epoch, "student") for epoch in range(4)] == [False, False, True, True]
    assert not any(diary.changed(epoch, "teacher") for epoch in range(4))
    assert {"train_focal", "train_amplification", "train_loss"} <= diary.metrics[0].keys()
    assert {"train_distillation", "train_hard"} <= diary.metrics[3].keys()
    assert [int(metrics["stage"]) for metrics in diary.metrics] == [1, 1, 2, 2]


def test_map_compares_raw_and_amplified_teacher_in_stage_one():
    model = AANDModel(**TINY).eval()
    images = torch.rand(2, 3, 64, 64)
    teacher = model.teacher(images)
    amplified, _ = model.amplify(teacher)
    model.start_stage(is_amplifying=True)
    expected = model.anomaly_map_generator(teacher, amplified, (64, 64)).anomaly_map
    assert torch.equal(model(images).anomaly_map, expected)
    model.start_stage(is_amplifying=False)
    expected = model.anomaly_map_generator(amplified, model.student(amplified), (64, 64)).anomaly_map
    assert torch.equal(model(images).anomaly_map, expected)


def test_validation_works_in_both_stages(tiny_data, tmp_path):
    run = engine(tmp_path, limit_val_batches=1.0, max_epochs=2)
    run.fit(build(), datamodule=tiny_data)
    assert run.trainer.current_epoch == 2


@pytest.mark.parametrize("is_amplifying", [True, False])
def test_stage_survives_state_dict_and_pickle(is_amplifying):
    model = AANDModel(**TINY)
    model.start_stage(is_amplifying)
    for source, weights_only in ((model.state_dict(), True), (model, False)):
        buffer = io.BytesIO()
        torch.save(source, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=weights_only)
        if weights_only:
            other = AANDModel(**TINY)
            other.load_state_dict(loaded)
            loaded = other
        assert loaded.is_amplifying == is_amplifying


def checkpoints(folder, filename="{epoch}", **when):
    """One checkpoint per epoch, 0.ckpt and on."""
    return ModelCheckpoint(folder, filename=filename, save_top_k=-1, auto_insert_metric_name=False, **when)


def test_checkpoint_of_each_stage_answers_alike(tiny_data, tmp_path):
    engine(tmp_path, checkpoints(tmp_path), max_epochs=2).fit(build(), datamodule=tiny_data)
    stages = [AAND.load_from_checkpoint(tmp_path / f"{epoch}.ckpt").model.is_amplifying for epoch in range(2)]
    assert stages == [True, False]


@pytest.mark.parametrize("epoch", [0, 2])
def test_resumed_run_equals_one_that_was_never_stopped(tiny_data, tmp_path, epoch):
    """Both stages: after epoch 0 (of stage one) and 2 (the first of stage two); share 0.5 of 4 epochs."""
    diary, resumed = Diary(), Diary()
    tiny_data.setup()  # draws its split once
    model = build(amplifier_share=0.5, anomaly_probability=0.0)
    no_shuffle(tiny_data)
    engine(tmp_path, checkpoints(tmp_path), diary).fit(model, datamodule=tiny_data)
    again = build(amplifier_share=0.5, anomaly_probability=0.0)
    engine(tmp_path, resumed).fit(again, datamodule=tiny_data, ckpt_path=tmp_path / f"{epoch}.ckpt")
    assert resumed.epochs == diary.epochs[epoch + 1 :]
    assert resumed.stages == diary.stages[epoch + 1 :]
    assert resumed.rates == diary.rates[epoch + 1 :]
    for key, value in diary.states[-1].items():
        torch.testing.assert_close(resumed.states[-1][key], value, msg=key)


def no_shuffle(datamodule):
    """Give the training images in one order, so that two runs can be compared."""
    from torch.utils.data import DataLoader

    dataset = datamodule.train_data
    datamodule.train_dataloader = lambda: DataLoader(dataset, batch_size=3, collate_fn=dataset.collate_fn)


def test_run_resumed_within_an_epoch_starts_its_stage(tiny_data, tmp_path):
    steps = checkpoints(tmp_path, "{step}", every_n_train_steps=1)
    engine(tmp_path, steps, max_epochs=2).fit(build(), datamodule=tiny_data)
    for step, stages in ((1, [1, 2]), (3, [2])):
        diary = Diary()
        engine(tmp_path, diary, max_epochs=2).fit(build(), datamodule=tiny_data, ckpt_path=tmp_path / f"{step}.ckpt")
        assert diary.stages == stages
        assert diary.changed(len(stages) - 1, "student")


def test_resuming_with_another_length_warns_that_the_stages_move(tiny_data, tmp_path):
    engine(tmp_path, checkpoints(tmp_path), max_epochs=2).fit(build(), datamodule=tiny_data)
    with pytest.warns(UserWarning, match="Stage two of the resumed run starts with epoch 1, of this one with epoch 3"):
        engine(tmp_path, max_epochs=6).fit(build(), datamodule=tiny_data, ckpt_path=tmp_path / "0.ckpt")


def export_identity(f, **_):
    """Write a graph of one operation in place of what torch exports in many seconds."""
    given, result = (helper.make_tensor_value_info(name, 1, [1, 3, 64, 64]) for name in ("input", "anomaly_map"))
    graph = helper.make_graph([helper.make_node("Identity", ["input"], ["anomaly_map"])], "model", [given], [result])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), f)


@pytest.mark.parametrize("kind", ["torch", "onnx", "openvino"])
def test_every_export_of_a_model_of_stage_one_warns(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", export_identity)
    module = build()
    module.model.start_stage(is_amplifying=True)
    with pytest.warns(UserWarning, match="its student is untrained") as warned:
        assert getattr(module, f"to_{kind}")(tmp_path).is_file()
    assert len([each for each in warned if "untrained" in str(each.message)]) == 1


def test_learning_rate_falls_within_each_stage(tiny_data, tmp_path):
    diary = Diary()
    engine(tmp_path, diary, max_epochs=10, limit_train_batches=1).fit(build(amplifier_share=0.5), datamodule=tiny_data)
    expected = [0.005] * 4 + [0.001]
    assert [rates[0] for rates in diary.rates[:5]] == pytest.approx(expected)
    assert [rates[1] for rates in diary.rates[5:]] == pytest.approx(expected)


def test_learning_rate_falls_at_80_and_90_percent_of_a_stage():
    factors = [learning_rate_factor(progress) for progress in (0, 0.79, 0.8, 0.89, 0.9, 1)]
    assert factors == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04])


@pytest.mark.parametrize(
    ("epochs", "share", "expected"),
    [(220, 100 / 220, 100), (2, 0.01, 1), (2, 0.99, 1), (3, 0.99, 2), (10, 0.5, 5), (1, 0.5, 0), (0, 0.5, 0)],
)
def test_each_stage_has_an_epoch_if_there_are_two(epochs, share, expected):
    assert split_epochs(epochs, share) == expected


def test_single_epoch_goes_to_stage_two_with_a_warning(tiny_data, tmp_path):
    diary = Diary()
    with pytest.warns(UserWarning, match="One epoch holds no two stages"):
        engine(tmp_path, diary, max_epochs=1).fit(build(), datamodule=tiny_data)
    assert diary.stages == [2]
    assert diary.changed(0, "student")


@pytest.mark.parametrize("arguments", [{"max_epochs": -1, "max_steps": 4}, {"max_epochs": 100, "max_steps": 3}])
def test_max_steps_count_as_epochs(tiny_data, tmp_path, arguments):
    diary = Diary()
    engine(tmp_path, diary, **arguments).fit(build(amplifier_share=0.5), datamodule=tiny_data)
    assert diary.stages == [1, 2]  # two batches an epoch


def test_training_without_end_is_refused(tiny_data, tmp_path):
    with pytest.raises(ValueError, match="this one has no end; set max_epochs or max_time"):
        engine(tmp_path, max_epochs=-1).fit(build(), datamodule=tiny_data)


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_share_outside_zero_and_one_is_refused(share):
    with pytest.raises(ValueError, match="amplifier_share must be between 0 and 1"):
        build(amplifier_share=share)


def test_missing_texture_folder_is_refused_when_training_but_not_at_inference(tiny_data, tmp_path):
    module = build(texture_dir=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="texture_dir is no folder"):
        engine(tmp_path).fit(module, datamodule=tiny_data)
    assert engine(tmp_path).predict(module, datamodule=tiny_data)


def test_batch_without_anomalies_trains_without_nan():
    module = build(anomaly_probability=0.0)
    module.model.start_stage(is_amplifying=True)
    module.log = lambda *_, **__: None
    loss = module.train().training_step(ImageBatch(image=torch.rand(2, 3, 64, 64)))
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in module.model.amplifiers.parameters())


def test_masks_of_a_folder_are_found_by_the_batch(tiny_data, tmp_path):
    with pytest.raises(ValueError, match="No foreground mask"):
        engine(tmp_path).fit(build(foreground_dir=str(tmp_path)), datamodule=tiny_data)


@pytest.mark.parametrize("arguments", [{"gate": False}, {"fixed_scale": 0.5}, {"hard_weight": 0.0}])
def test_ablations_train_both_stages(tiny_data, tmp_path, arguments):
    diary = Diary()
    engine(tmp_path, diary, max_epochs=2).fit(build(**arguments), datamodule=tiny_data)
    assert diary.changed(0, "amplifiers")
    assert diary.changed(1, "student")


@pytest.mark.slow
@pytest.mark.parametrize(("killed_after", "stages"), [(1, [1, 2, 2]), (3, [2])])
def test_killed_run_resumes_where_it_was(tiny_data, tiny_folder, tmp_path, killed_after, stages):
    """Kill -9 in the epoch after ``killed_after`` ones of four."""
    script = tmp_path / "train.py"
    script.write_text(
        f"""
from pathlib import Path
from anomalib.data import Folder
from lightning.pytorch import Callback
from anomalib.callbacks import ModelCheckpoint
from tiny import build, engine

class Hang(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == {killed_after} and batch_idx == 1:
            print("hanging", flush=True)
            import time
            time.sleep(600)

data = Folder(name="tiny", root={str(tiny_folder)!r}, normal_dir="train/good", train_batch_size=3, num_workers=0)
saving = ModelCheckpoint({str(tmp_path)!r}, filename="last", enable_version_counter=False)
engine(Path({str(tmp_path)!r}), Hang(), saving, max_epochs=4, limit_val_batches=0).fit(
    build("AAND", amplifier_share=0.5), datamodule=data)
""",
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 300
    for line in process.stdout:
        if "hanging" in line:
            break
        assert time.monotonic() < deadline, "the run never came to the epoch in which it is killed"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    diary = Diary()
    run = engine(tmp_path, diary)
    run.fit(build(amplifier_share=0.5), datamodule=tiny_data, ckpt_path=tmp_path / "last.ckpt")
    assert diary.epochs == list(range(killed_after, 4))
    assert diary.stages == stages
    assert run.trainer.global_step == 8
    assert all(diary.changed(i, "amplifiers" if stage == 1 else "student") for i, stage in enumerate(stages))


def test_loading_a_checkpoint_of_stage_one_warns_unless_it_is_resumed(tiny_data, tmp_path, recwarn):
    engine(tmp_path, checkpoints(tmp_path), max_epochs=2).fit(build(), datamodule=tiny_data)
    engine(tmp_path, max_epochs=2).fit(build(), datamodule=tiny_data, ckpt_path=tmp_path / "0.ckpt")
    AAND.load_from_checkpoint(tmp_path / "1.ckpt")
    assert not [warning for warning in recwarn if "saved in stage one" in str(warning.message)]
    with pytest.warns(UserWarning, match="saved in stage one: its student is untrained"):
        AAND.load_from_checkpoint(tmp_path / "0.ckpt")
