"""Training under the trainer's options: precision, several processes, resuming, callbacks, memory."""

import os
import subprocess
import sys
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data import ImageBatch
from lightning import seed_everything
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from tiny import FOLDERS, MODELS, TINY, build, engine

import anomalib_rdpp
from anomalib_rdpp.threshold import NormalThreshold


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


class Losses(Callback):
    """Note the loss of each step."""

    def __init__(self) -> None:
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        del trainer, pl_module, batch, batch_idx
        self.steps.append(float(outputs["loss"]))


# -- precision


def dtypes(features):
    """Types of a model's training features."""
    return {feature.dtype for scales in features for feature in scales}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_losses_gradients_and_map_in_single(name, dtype):
    """By torch's autocast; Lightning has no float16 on a CPU and takes bfloat16 instead."""
    module = build(name, 32)
    images = torch.rand(2, 3, 32, 32)
    for is_amplifying in (True, False) if name == "AAND" else (None,):
        arguments = ()
        if is_amplifying is not None:
            module.model.start_stage(is_amplifying)
        if is_amplifying:
            arguments = module.anomalies(images)[1:]
        module.train()
        with torch.autocast("cpu", dtype):
            features = module.model(images, *arguments[:1])
            terms = module.loss(features, *arguments)
        assert dtype in dtypes(features), "nothing was computed in half precision"
        assert {term.dtype for term in terms.values()} == {torch.float32}
        terms["loss"].backward()
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        assert gradients
        assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)
        with torch.autocast("cpu", dtype):
            prediction = module.eval().model(images)
        for value in (prediction.anomaly_map, prediction.pred_score):
            assert value.dtype == torch.float32
            assert value.isfinite().all()


@pytest.mark.no_cover
def test_mixed_precision_trains_and_tests_without_nan(name, tiny_data, tmp_path):
    losses = Losses()
    run = engine(tmp_path, losses, precision="bf16-mixed")
    module = build(name, 32)
    run.fit(module, datamodule=tiny_data)
    metrics = run.test(module, datamodule=tiny_data, verbose=False)[0]
    assert torch.tensor([*losses.steps, *metrics.values()]).isfinite().all()
    assert all(value.isfinite().all() for value in module.state_dict().values() if value.is_floating_point())


# -- seeds and resuming


def fit_with_seed(name, data, folder):
    data.setup(TrainerFn.FITTING)  # draws its split once
    seed_everything(3)
    losses, module = Losses(), build(name)
    engine(folder, losses, limit_val_batches=0).fit(module, datamodule=data)
    return losses.steps, module.model.state_dict()


@pytest.mark.no_cover
def test_one_seed_gives_equal_losses_step_by_step_and_equal_weights(name, tiny_data, tmp_path):
    (first, weights), (second, others) = (fit_with_seed(name, tiny_data, tmp_path) for _ in range(2))
    assert len(first) == 4
    assert first == second
    assert all(torch.equal(value, others[key]) for key, value in weights.items())


def run_script(script):
    """Run a script that builds tiny models; give what it printed."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(script)],
        cwd=script.parent,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.mark.slow
def test_run_killed_ten_times_ends_with_a_whole_checkpoint(name, tiny_folder, tmp_path):
    """Kill -9 at random moments of training and saving, ten times; each run goes on from the last whole epoch."""
    script = tmp_path / "train.py"
    script.write_text(
        f"""
import os, random, signal, tempfile, time
from pathlib import Path
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Folder
from lightning.pytorch import Callback
from tiny import build, engine

path, epochs = Path("last.ckpt"), 40
tempfile.tempdir = "."  # Lightning writes there first; what a kill leaves behind goes with the test

class Begun(Callback):
    def __init__(self, pipe):
        self.pipe = pipe
    def on_train_batch_end(self, *_):
        os.write(self.pipe, b".")

def train(pipe):
    data = Folder(name="tiny", root={str(tiny_folder)!r}, normal_dir="train/good", train_batch_size=3, num_workers=0)
    saving = ModelCheckpoint(".", filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    run = engine(Path("."), Begun(pipe), saving, max_epochs=epochs, limit_val_batches=0)
    run.fit(build({name!r}), datamodule=data, ckpt_path=path if path.exists() else None)
    print("steps", run.trainer.global_step, flush=True)

random.seed(0)
killed = 0
while True:
    reading, writing = os.pipe()
    child = os.fork()  # what is imported needs no second import
    if not child:
        train(writing)
        os._exit(0)
    os.close(writing)
    if killed == 10:
        break
    assert os.read(reading, 1), "the run trained no step"
    time.sleep(random.uniform(0, 0.8))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it ended before it was killed"
    os.close(reading)
    killed += 1
    if path.exists():  # whole, whatever was going on
        print("killed after step", torch.load(path, weights_only=True)["global_step"], flush=True)
while os.read(reading, 1000):
    pass
assert os.waitpid(child, 0)[1] == 0
""",
    )
    assert run_script(script).splitlines()[-1] == "steps 80"
    assert getattr(anomalib_rdpp, name).load_from_checkpoint(tmp_path / "last.ckpt")


# -- the trainer's options

OPTIONS = {
    "accumulate_grad_batches": {"accumulate_grad_batches": 2},
    "gradient_clip_val": {"gradient_clip_val": 0.5},
    "fast_dev_run": {"fast_dev_run": True},
    "limit_train_batches": {"limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1},
    "EMAWeightAveraging": {"callbacks": lambda: EMAWeightAveraging(decay=0.9)},
    "EarlyStopping": {"callbacks": lambda: EarlyStopping("train_loss", check_on_train_epoch_end=True)},
    "CSVLogger": {"logger": CSVLogger},
}


@pytest.mark.no_cover
@pytest.mark.parametrize("option", OPTIONS)
def test_option_of_the_trainer_works(name, option, tiny_data, tmp_path):
    arguments = dict(OPTIONS[option])
    callbacks = [arguments.pop("callbacks")()] if "callbacks" in arguments else []
    if "logger" in arguments:
        arguments["logger"] = arguments["logger"](tmp_path)
    run = engine(tmp_path, *callbacks, **{"limit_val_batches": 0, **arguments})
    module = build(name, 32)
    run.fit(module, datamodule=tiny_data)
    expected = {"accumulate_grad_batches": 2, "fast_dev_run": 1, "limit_train_batches": 2}.get(option, 4)
    assert run.trainer.global_step == expected
    assert torch.tensor([float(value) for value in run.trainer.callback_metrics.values()]).isfinite().all()
    if option == "CSVLogger":
        assert "train_loss" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_tiler_is_refused(name, tiny_data, tmp_path):
    """By anomalib: the model has no attribute ``tiler``."""
    with pytest.raises(ValueError, match="does not support tiling"):
        engine(tmp_path, TilerConfigurationCallback(enable=True)).fit(build(name), datamodule=tiny_data)


@pytest.mark.no_cover
@pytest.mark.parametrize("name", ["RDPP", pytest.param("AAND", marks=pytest.mark.slow)])
def test_tiled_ensemble_of_anomalib_trains_and_tests(name, tiny_folder, tmp_path, monkeypatch):
    """Its pipeline takes no arguments of a model, hence other defaults here."""
    from anomalib.pipelines.tiled_ensemble import EvalTiledEnsemble, TrainTiledEnsemble

    monkeypatch.chdir(tmp_path)
    init = getattr(anomalib_rdpp, name).__init__
    parameters = signature(init).parameters.values()
    defaults = tuple(TINY.get(p.name, p.default) for p in parameters if p.default is not p.empty)
    monkeypatch.setattr(init, "__defaults__", defaults)
    data = {"name": "tiny", "root": str(tiny_folder), **FOLDERS, "train_batch_size": 2, "num_workers": 0}
    config = {
        "seed": 0,
        "accelerator": "cpu",
        "default_root_dir": "results",
        "tiling": {"image_size": [64, 32], "tile_size": 32, "stride": 32},
        "normalization_stage": "image",
        "thresholding_stage": "image",
        "data": {
            "class_path": "anomalib.data.Folder",
            "init_args": {**data, "val_split_mode": "same_as_test", "test_split_mode": "from_dir"},
        },
        "SeamSmoothing": {"apply": True, "sigma": 2, "width": 0.1},
        "TrainModels": {"model": {"class_path": f"anomalib_rdpp.{name}"}, "trainer": {"max_epochs": 1}},
    }
    Path("ensemble.yaml").write_text(yaml.safe_dump(config))
    TrainTiledEnsemble().run(SimpleNamespace(config="ensemble.yaml"))
    folder = Path("results") / name / "tiny/latest"
    EvalTiledEnsemble(folder).run(SimpleNamespace(config="ensemble.yaml"))  # prints failures and goes on
    assert len(list(folder.glob("weights/lightning/*.ckpt"))) == 2
    assert "pixel_AUROC" in (folder / "metric_results.csv").read_text()


def test_stochastic_weight_averaging_is_refused(name, tiny_data, tmp_path):
    with pytest.raises(ValueError, match="EMAWeightAveraging"):
        engine(tmp_path, StochasticWeightAveraging(0.01)).fit(build(name), datamodule=tiny_data)


def test_batch_of_one_at_the_smallest_size_says_what_to_do(name):
    model = build(name, 32).model
    with pytest.raises(ValueError, match="no last batch of one image"):
        model.train()(torch.rand(1, 3, 32, 32))
    assert model.eval()(torch.rand(1, 3, 32, 32)).anomaly_map.isfinite().all()


# -- what needs no defects


def test_threshold_and_stopping_rule_need_no_defects(name, tiny_data, tmp_path):
    tiny_data.val_split_mode = "from_train"
    stopping = EarlyStopping("val_distance", patience=1, min_delta=10)  # nothing falls by 10
    module = build(name, post_processor=NormalThreshold(0.9))
    run = engine(tmp_path, stopping, max_epochs=9)
    run.fit(module, datamodule=tiny_data)
    assert run.trainer.current_epoch == 2
    scores = torch.cat([batch.pred_score for batch in predict_raw(module, tiny_data.val_dataloader())])
    torch.testing.assert_close(module.post_processor.image_threshold, scores.quantile(0.9))
    metrics = run.test(module, datamodule=tiny_data, verbose=False)[0]
    assert {"image_F1Score", "pixel_F1Score"} <= metrics.keys()
    batch = run.predict(module, datamodule=tiny_data)[0]
    assert torch.equal(batch.pred_label, batch.pred_score > 0.5)
    assert 0 < batch.anomaly_map.min() < batch.anomaly_map.max() < 1
    run.trainer.save_checkpoint(tmp_path / "model.ckpt")
    post_processor = type(module).load_from_checkpoint(tmp_path / "model.ckpt").post_processor
    assert isinstance(post_processor, NormalThreshold)
    assert post_processor.quantile == 0.9
    assert post_processor.image_threshold == module.post_processor.image_threshold


def predict_raw(module, loader):
    """Predictions without the post-processor."""
    return [module.eval().model(module.pre_processor(batch.image)) for batch in loader]


def test_threshold_says_what_it_lacks():
    with pytest.raises(ValueError, match="quantile must be above 0 and at most 1, got 99"):
        NormalThreshold(99)
    with pytest.raises(ValueError, match="take val_split_mode from_train"):
        NormalThreshold().on_validation_epoch_end(SimpleNamespace(sanity_checking=False), None)


def test_threshold_of_a_single_normal_image_and_of_none_while_the_trainer_checks_itself():
    threshold, trainer = NormalThreshold(), SimpleNamespace(sanity_checking=True)
    batch = ImageBatch(image=torch.rand(2, 3, 8, 8), pred_score=torch.tensor([0.3, 9.0]))
    batch.anomaly_map = torch.tensor([0.2, 8.0])[:, None, None, None] * torch.ones(2, 1, 8, 8)  # a score of its own
    threshold.on_validation_batch_end(trainer, None, batch)  # no labels: nothing to go by
    threshold.on_validation_epoch_end(trainer, None)
    assert threshold.image_threshold.isnan()
    batch.gt_label = torch.tensor([False, True])
    threshold.on_validation_batch_end(trainer, None, batch)
    trainer.sanity_checking = False
    threshold.on_validation_epoch_end(trainer, None)
    assert (threshold.image_threshold, threshold.image_max) == (pytest.approx(0.3), pytest.approx(0.6))
    assert (threshold.pixel_threshold, threshold.pixel_max) == (pytest.approx(0.2), pytest.approx(0.4))


def test_images_without_labels_have_no_distance(name):
    batch = ImageBatch(image=torch.rand(2, 3, 64, 64), anomaly_map=torch.rand(2, 1, 64, 64))
    build(name).on_validation_batch_end(batch)  # has no labels to pick the normal ones by


# -- memory


@pytest.mark.slow
def test_memory_of_training_is_flat(name, tiny_data, tmp_path):
    """Resident memory over 200 steps grows by less than 1 % after the first 60."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        pytest.skip("resident memory is read from /proc, which this system has not")
    sizes = []

    class Resident(Callback):
        def on_train_batch_end(self, *_):
            sizes.append(int(pages.read_text().split()[1]))

    # A stage of AAND has memory of its own: one epoch of stage one, the rest is stage two.
    module = build(name, **({"amplifier_share": 0.01} if name == "AAND" else {}))
    engine(tmp_path, Resident(), max_epochs=130, limit_val_batches=0).fit(module, datamodule=tiny_data)
    assert len(sizes) == 260
    assert max(sizes[-20:]) < 1.01 * max(sizes[40:60])


# -- several processes


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp"])
def test_two_processes_agree(name, strategy, tiny_folder, tiny_data, tmp_path):
    """Gloo on the CPU: no unused parameters, one state on both ranks, other noise, the metrics of one process."""
    script = tmp_path / "train.py"
    script.write_text(
        f"""
from pathlib import Path
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Folder
from lightning import seed_everything
from lightning.pytorch import Callback
from tiny import FOLDERS, build, engine

class Seeds(Callback):
    def on_train_start(self, trainer, pl_module):
        self.seed = torch.initial_seed()
    def on_train_end(self, trainer, pl_module):
        self.noise = torch.rand(3)

if __name__ == "__main__":
    seed_everything(0, workers=True)
    torch.set_num_threads(1)
    data = Folder(name="tiny", root={str(tiny_folder)!r}, **FOLDERS, train_batch_size=2, eval_batch_size=2,
                  num_workers=0, val_split_mode="same_as_test")
    model, seeds = build({name!r}), Seeds()
    saving = ModelCheckpoint(".", filename="model", enable_version_counter=False)
    run = engine(Path("."), seeds, saving, devices=2, strategy={strategy!r}, max_epochs=3)
    run.fit(model, datamodule=data)
    rank = run.trainer.global_rank
    state = {{name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}}
    metrics = run.test(model, datamodule=data, verbose=False)[0]
    torch.save({{"state": state, "seed": seeds.seed, "metrics": metrics, "noise": seeds.noise}}, f"rank{{rank}}.pt")
""",
    )
    run_script(script)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert first["seed"] != second["seed"]
    assert not torch.equal(first["noise"], second["noise"])
    differing = [name for name, value in first["state"].items() if not torch.equal(value, second["state"][name])]
    assert not differing
    assert first["metrics"] == pytest.approx(second["metrics"])

    tiny_data.val_split_mode = "same_as_test"
    module = getattr(anomalib_rdpp, name).load_from_checkpoint(tmp_path / "model.ckpt")
    alone = engine(tmp_path).test(module, datamodule=tiny_data, verbose=False)[0]
    assert alone == pytest.approx(first["metrics"], abs=1e-4)
