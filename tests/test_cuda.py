"""On a GPU: the same map as on the CPU, a step of training, and no wait for the GPU within it."""

import pytest
import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Trainer

from anomalib_rdpp import AAND, RDPP

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that CUDA reaches")
SMALL = {"backbone": "resnet18", "pre_trained": False, "evaluator": False, "visualizer": False}


@pytest.mark.parametrize("model_class", [RDPP, AAND])
def test_map_on_the_gpu_is_that_of_the_cpu(model_class):
    model = model_class(**SMALL).eval()
    images = torch.rand(2, 3, 64, 96)
    expected = model.model(images)
    actual = model.cuda().model(images.cuda())
    for ours, theirs in zip(actual, expected, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("model_class", [RDPP, AAND])
def test_model_trains_on_the_gpu(model_class, precision, tiny_data, tmp_path):
    trainer = Trainer(
        max_epochs=2, accelerator="gpu", devices=1, precision=precision, logger=False, default_root_dir=tmp_path,
        enable_checkpointing=False, limit_train_batches=1, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model_class(**SMALL, pre_processor=model_class.configure_pre_processor((64, 64))), datamodule=tiny_data)
    assert trainer.global_step == 2


@pytest.mark.parametrize("model_class", [RDPP, AAND])
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_training_resumes_on_the_gpu(model_class, strategy, make_tiny_data, tmp_path):
    def fit(epochs, **given):
        trainer = Trainer(
            max_epochs=epochs, accelerator="gpu", devices=1, strategy=strategy, precision="bf16-mixed", logger=False,
            default_root_dir=tmp_path, enable_checkpointing=False, limit_val_batches=0,
        )  # fmt: skip
        model = model_class(**SMALL, pre_processor=model_class.configure_pre_processor((64, 64)))
        trainer.fit(model, datamodule=make_tiny_data(), **given)
        return trainer

    fit(2).save_checkpoint(tmp_path / "last.ckpt")
    assert fit(3, ckpt_path=tmp_path / "last.ckpt", weights_only=False).global_step == 6


@pytest.mark.parametrize("kind", ["to_openvino", "to_onnx", "to_torch"])
def test_model_on_the_gpu_is_exported(kind, tmp_path):
    model = RDPP(**SMALL, pre_processor=RDPP.configure_pre_processor((64, 64))).cuda()
    assert getattr(model, kind)(tmp_path).is_file()


@pytest.mark.parametrize("projection", [True, False])
def test_step_of_training_never_waits_for_the_gpu(projection, monkeypatch):
    model = RDPP(**SMALL, projection=projection).cuda().train()
    monkeypatch.setattr(model, "log_terms", lambda terms, _: terms["loss"])
    batch = ImageBatch(image=torch.rand(2, 3, 64, 64, device="cuda"))
    model.training_step(batch).backward()  # the first one sets things up
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.training_step(batch).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
