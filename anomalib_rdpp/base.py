"""What both Lightning classes answer anomalib alike: input, checkpoints, steps of evaluation.

A mixin, not a base class: anomalib's ``get_model`` and ``list_models`` look one level below ``AnomalibModule``.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torchvision.transforms.v2 import Resize

from anomalib_rdpp.callbacks import LastState
from anomalib_rdpp.export import SafeExportMixin
from anomalib_rdpp.pixels import datasets, is_fixed, read_right, refuse_moving, refuse_normalize
from anomalib_rdpp.resize import keep_antialias
from anomalib_rdpp.teacher import architecture
from anomalib_rdpp.threshold import QUANTILE, NormalThreshold
from anomalib_rdpp.visualizer import ScoreVisualizer

OVERSHOOT = 0.5  # beyond [0, 1]: more than sharp resizes, less than Normalize


class DistillationMixin(SafeExportMixin):
    """Input in [0, 1], checkpoints that need no teacher from elsewhere, the steps of evaluation, whole exports."""

    structure: frozenset[str]  # arguments that the shapes in a checkpoint depend on
    learning_type = LearningType.ONE_CLASS
    trainer_arguments: ClassVar[dict[str, Any]] = {}  # every option of the trainer is the user's

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize to ``image_size`` (height, width; 256 x 256 by default) and no more: the teacher normalises."""
        return PreProcessor(transform=Resize(image_size or (256, 256), antialias=True))

    @staticmethod
    def configure_visualizer() -> ScoreVisualizer:
        """Draw image, heat map, and on the image again the truth's outline in green and the found one in red."""
        return ScoreVisualizer(
            fields=["image"],
            overlay_fields=[("image", ["anomaly_map"]), ("image", ["gt_mask", "pred_mask"])],
            field_size=(384, 384),
            overlay_fields_config={"gt_mask": {"color": (0, 255, 0), "alpha": 1.0, "mode": "contour"}},
            text_config={"size": 22},  # anomalib's own is too wide for the titles
        )

    def configure_callbacks(self) -> list[Callback]:
        """Add what keeps a training from being lost."""
        return [*super().configure_callbacks(), LastState()]

    def forward(self, batch: torch.Tensor, *args: object, **kwargs: object) -> InferenceBatch:
        """Give map and score of images of any size; exported graphs are made from this."""
        del args, kwargs
        if isinstance(self.pre_processor, PreProcessor):
            keep_antialias(self.pre_processor.transform, self.pre_processor.export_transform)
        images = self.pre_processor(batch) if self.pre_processor else batch
        predictions = self.model(images.clamp(0, 1))  # a bicubic resize overshoots
        return self.post_processor(predictions) if self.post_processor else predictions

    def validation_step(self, batch: Batch, *_: object, **__: object) -> STEP_OUTPUT:
        """Add map and score to the batch."""
        return batch.update(**self.model(batch.image)._asdict())

    def on_validation_epoch_start(self) -> None:
        """Start to sum up the maps of normal images."""
        self.normal_sum = torch.zeros(2, device=self.device)

    def on_validation_batch_end(self, outputs: Batch, *_: object, **__: object) -> None:
        """Add mean maps and number of the batch's normal images."""
        if outputs.gt_label is not None:
            normal = outputs.anomaly_map[~outputs.gt_label.bool()]
            self.normal_sum += torch.stack([normal.flatten(1).mean(1).sum(), normal.new_tensor(len(normal))])

    def on_validation_epoch_end(self) -> None:
        """Log the mean map of normal images for stopping rules; ``ValueError`` if one watches it and there are none."""
        total, count = self.trainer.strategy.reduce(self.normal_sum, reduce_op="sum")
        if count:
            self.log("val_distance", total / count, sync_dist=True)
        watching = [each for each in self.trainer.callbacks if getattr(each, "monitor", None) == "val_distance"]
        if watching and not count and not self.trainer.sanity_checking:
            msg = (
                f"{type(watching[0]).__name__} watches val_distance, the mean map of normal images, but the images "
                "validated hold none: raise limit_val_batches, or choose another val_split_mode."
            )
            raise ValueError(msg)

    def log_terms(self, terms: dict[str, torch.Tensor], batch_size: int) -> torch.Tensor:
        """Log each term of the loss by its name; give back their sum, ``loss``."""
        for name, term in terms.items():
            options = {"on_step": False, "on_epoch": True, "prog_bar": name == "loss", "batch_size": batch_size}
            self.log(f"train_{name}", term.detach(), **options)
        return terms["loss"]

    def setup(self, stage: str) -> None:
        """Read all files right, training images once; refuse, by ``ValueError``, what normalises or moves pixels."""
        super().setup(stage)
        # Lightning warns that it uses our hook below although a datamodule was passed, which is what we want, and that
        # the teacher doesn't train.
        warnings.filterwarnings("ignore", message=r".*overridden `on_before_batch_transfer`|.*module\(s\) in eval mode")
        own = getattr(self.pre_processor, "transform", self.pre_processor)
        transforms = [(f"The pre-processor of {self.name}", own)]
        self.model.teacher.keeps = False
        self.forget()
        for name, dataset in datasets(self.trainer) if self._trainer else ():
            read_right(dataset)
            transform = getattr(dataset, "augmentations", getattr(dataset, "transform", None))
            transforms.append((f"The transform of the {name} images", transform))
            if stage == "fit" and name == "train" and is_fixed([own, transform]):
                self.model.teacher.keeps, dataset.kept_items = True, {}
        for where, transform in transforms:
            refuse_normalize(transform, where)
            if stage == "fit" and self.hparams.get("foreground_dir"):
                refuse_moving(transform, where)

    def forget(self) -> None:
        """Let go of what training keeps of images that come again and again: their features, and they themselves."""
        self.model.teacher.kept.clear()
        for name, dataset in datasets(self.trainer) if self._trainer else ():
            if name == "train" and hasattr(dataset, "reads_right"):
                dataset.kept_items = None

    def on_fit_start(self) -> None:
        """Refuse ``StochasticWeightAveraging`` by ``ValueError``; give each process its own noise, as no seed does."""
        super().on_fit_start()
        if any(isinstance(callback, StochasticWeightAveraging) for callback in self.trainer.callbacks):
            msg = (
                "StochasticWeightAveraging resets the statistics of every BatchNorm, the frozen teacher's too; take "
                "lightning.pytorch.callbacks.EMAWeightAveraging to average weights."
            )
            raise ValueError(msg)
        if self.trainer.world_size > 1:
            torch.manual_seed(torch.initial_seed() + self.global_rank)

    def on_before_batch_transfer(self, batch: Batch, *_: object) -> Batch:
        """Refuse, by ``ValueError``, files with pixels far outside of [0, 1], while they are still on the CPU."""
        image = getattr(batch, "image", None)
        if image is None or image.device.type != "cpu":
            return batch
        is_bad = [not (float(pixels.min()) >= -OVERSHOOT and float(pixels.max()) <= 1 + OVERSHOOT) for pixels in image]
        if any(is_bad):
            paths = getattr(batch, "image_path", None) or range(len(image))
            names = [path for path, bad in zip(paths, is_bad, strict=True) if bad]
            msg = (
                f"Pixels are NaN or infinite or outside of [0, 1] in {names}: remove or repair these images, and take "
                "Normalize out of the augmentations; the model normalises by itself."
            )
            raise ValueError(msg)
        return batch

    def on_train_batch_start(self, batch: Batch, *_: object) -> None:
        """Bring back into [0, 1] what a bicubic resize and its like overshoot."""
        if getattr(batch, "image", None) is not None:
            batch.image = batch.image.clamp(0, 1)

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse, by ``ValueError``, another network's checkpoint before torch lists all its tensors."""
        state, own = checkpoint.get("state_dict", {}), self.state_dict()
        stored = checkpoint.get("hyper_parameters", {})
        stored = stored and {"score": "max", "score_fraction": 0.01, **stored}  # before the arguments were
        defaults = signature(type(self)).parameters  # what checkpoints mean that are older than an argument
        is_standardising = "standardised" in (stored.get("score"), self.hparams["score"])
        shaping = self.structure | ({"score"} if is_standardising else set())
        for name in sorted(shaping & self.hparams.keys()) if stored else ():
            theirs, ours = stored.get(name, defaults[name].default), self.hparams[name]
            theirs, ours = (list(each) if isinstance(each, tuple) else each for each in (theirs, ours))
            if name == "backbone":  # the checkpoint holds the teacher: its weights' tag doesn't matter
                theirs, ours = architecture(theirs), architecture(ours)
            if theirs != ours:
                msg = (
                    f"The checkpoint holds a {self.name} with {name} '{theirs}', this model has '{ours}'; "
                    f"build it with {name}={theirs}."
                )
                raise ValueError(msg)
        theirs, ours = ({name.split(".")[1] for name in names if name.startswith("model.")} for names in (state, own))
        if theirs and theirs != ours:
            msg = f"The checkpoint holds {sorted(theirs)}, of another model than {self.name}, which has {sorted(ours)}."
            raise ValueError(msg)
        # anomalib stores buffers of metrics (AUPRO has one) but not the evaluator, and then fails to load them.
        for name in [name for name in state if name.startswith("evaluator.") and name not in own]:
            del state[name]
        state |= {name: own[name] for name in own if name.startswith("evaluator.") and name not in state}
        for name in ("score", "score_fraction") if stored else ():
            value = stored[name]
            if value != self.hparams[name]:
                rank_zero_warn(f"{name} is {value}, as in the checkpoint, whose thresholds are of that scale.")
                self.hparams[name] = value
                setattr(self.model.anomaly_map_generator, name, value)
        quantile = (checkpoint.get("anomalib_post_processor_config") or {}).get(QUANTILE)
        if quantile is not None and type(self.post_processor) is PostProcessor:  # anomalib's default: none was chosen
            default, self.post_processor = self.post_processor, NormalThreshold(quantile)
            if self._trainer is not None:  # which has taken the default for a callback already
                callbacks = self.trainer.callbacks
                callbacks[:] = [self.post_processor if each is default else each for each in callbacks]
        super().on_load_checkpoint(checkpoint)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> "DistillationMixin":  # noqa: ANN401
        """Load a checkpoint without fetching the teacher, whose weights it holds; arguments as anomalib's."""
        kwargs = {"pre_trained": False, "teacher_weights": None, **kwargs}
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)


@contextmanager
def short_errors() -> Iterator[None]:
    """End a command of anomalib with the text of a refused argument: jsonargparse would bury it in 190 lines."""
    try:
        yield
    except (ValueError, OSError) as error:
        program = Path(sys.argv[0])
        if program.stem == "anomalib" or program.parts[-3:] == ("anomalib", "cli", "cli.py"):
            raise SystemExit(str(error)) from None
        raise
