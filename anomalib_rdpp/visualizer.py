"""Pictures with their score, and a table of all scores beside them."""

import csv
from pathlib import Path

from anomalib.data import ImageBatch
from anomalib.models import AnomalibModule
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image.functional import add_text_to_image
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from anomalib_rdpp.pixels import EIGHT_BITS, pixel_kind


class ScoreVisualizer(ImageVisualizer):
    """anomalib's pictures with score and label in the corner, and ``scores.csv``: path, score, label, threshold."""

    def on_test_start(self, trainer: Trainer, *_: object) -> None:
        """Start the table."""
        self.output_dir = Path(self.output_dir or Path(trainer.default_root_dir) / "images")
        if trainer.is_global_zero:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            (self.output_dir / "scores.csv").write_text("path,score,label,threshold\n", encoding="utf-8")

    on_predict_start = on_test_start

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: AnomalibModule, outputs: ImageBatch, *_: object, **__: object
    ) -> None:
        """Save a picture of each image, and its row."""
        place = [getattr(trainer.datamodule, name, None) for name in ("name", "category")]
        threshold = float(getattr(pl_module.post_processor, "normalized_image_threshold", "nan"))
        rows = []
        for item in outputs:
            path, score, label = item.image_path or "", float(item.pred_score), item.pred_label
            row = [path, f"{score:.4f}", "" if label is None else int(label), f"{threshold:g}"]
            if path and pixel_kind(path) != EIGHT_BITS:
                item.image_path = None  # or anomalib would draw it black or white
            picture = self.visualize(item)
            if picture is not None:
                title = f"{score:.3f}" + ("" if label is None else " anomalous" if label else " normal")
                size = self.text_config.get("size") or 16
                picture = add_text_to_image(picture, title, size=size, position=(10, picture.height - 2 * size))
                picture.save(generate_output_filename(path, self.output_dir, *place))
            rows.append(row)
        with (self.output_dir / "scores.csv").open("a", newline="", encoding="utf-8") as table:
            csv.writer(table).writerows(rows)

    def on_predict_end(self, *_: object) -> None:
        """Say where the table is."""
        rank_zero_info(f"Scores and labels are in {self.output_dir / 'scores.csv'}, beside the pictures.")
