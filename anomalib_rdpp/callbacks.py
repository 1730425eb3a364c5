"""Nothing trained is lost, whatever ends the training."""

from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torchmetrics import Metric


class LastState(Callback):
    """Validate and store the state in which a training ends.

    anomalib stores when it has validated, which is not each epoch's end, and never that of a training cut short. Where
    its callback or a user's keeps the latest state, that is the last one now, with thresholds of its own. What a user
    stores by a metric, or under a name with a number in it, stays as it is.
    """

    def __init__(self) -> None:
        self.is_validated = self.is_stored = True
        self.has_trained = False

    def on_train_batch_start(self, *_: object) -> None:
        """Note that the state changes."""
        self.is_validated = self.is_stored = False
        self.has_trained = True

    def on_validation_end(self, *_: object) -> None:
        """Note that thresholds are those of the state, and not stored: those who store come later."""
        self.is_validated, self.is_stored = True, False

    def on_save_checkpoint(self, *_: object) -> None:
        """Note that the state is stored."""
        self.is_stored = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate and store what is not yet; under DDP, BatchNorm's statistics become those of the first process."""
        if trainer.world_size > 1:
            for buffer in pl_module.buffers():
                torch.distributed.broadcast(buffer, 0)
        self._finish(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do the same if the training is interrupted; of several processes the others may be gone already.

        After an error the state is stored as it is.
        """
        pl_module.forget()
        if trainer.state.fn != TrainerFn.FITTING or trainer.world_size > 1 or not self.has_trained:
            return
        if is_stopped := isinstance(exception, KeyboardInterrupt | SIGTERMException):
            rank_zero_info("Interrupted: the model is validated once more, for its thresholds, and stored.")
        self._finish(trainer, pl_module, is_stopped)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of training images; say so if there was nothing to train."""
        pl_module.forget()
        if not self.has_trained:
            reached = f"max_epochs {trainer.max_epochs} or max_steps {trainer.max_steps}"
            rank_zero_warn(f"Nothing was trained: {reached} is reached already, as by a checkpoint; raise it.")

    def _finish(self, trainer: Trainer, pl_module: Any, is_validating: bool = True) -> None:  # noqa: ANN401
        """Validate, and store even if that fails."""
        if trainer.fast_dev_run:
            return
        try:
            if is_validating and not self.is_validated and trainer.enable_validation:
                for module in pl_module.modules():
                    if isinstance(module, Metric):  # may hold half of an interrupted validation
                        module.reset()
                trainer.validating = True
                with mock.patch.object(type(trainer), "received_sigterm", False):  # would end this validation too
                    trainer.fit_loop.epoch_loop.val_loop.run()
        finally:
            trainer.training = True
            self._store_all(trainer, pl_module)
        if not trainer.enable_validation:
            rank_zero_info("Without validation the model has no thresholds, nor do its answers have labels.")

    def _store_all(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ANN401
        """Store by all that keep the latest state."""
        callbacks = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
        for callback in callbacks:
            if callback.monitor is None and not (self.is_stored and len(callbacks) == 1):
                self._store(callback, trainer, pl_module)
        if getattr(pl_module.model, "is_amplifying", False):
            rank_zero_warn(
                f"{pl_module.name} WAS STOPPED IN STAGE ONE: its student is untrained, its maps and scores mean "
                "nothing. Go on with `anomalib fit --ckpt_path` and the same max_epochs, or train with a smaller one."
            )

    def _store(self, callback: ModelCheckpoint, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store by a callback that keeps the latest state: by its own rules, or over what it has stored."""
        self.is_stored = False
        callback.on_train_epoch_end(trainer, pl_module)
        callback.on_validation_end(trainer, pl_module)
        if not self.is_stored and callback.best_model_path and "{" not in (callback.filename or "{epoch}"):
            trainer.save_checkpoint(callback.best_model_path, callback.save_weights_only)
