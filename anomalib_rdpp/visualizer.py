"""Pictures with their score, and a table of all scores beside them."""

import csv
from itertools import count
from pathlib import Path

from anomalib.data import ImageBatch
from anomalib.models import AnomalibModule
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image.functional import add_text_to_image
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from anomalib_rdpp.pixels import EIGHT_BITS, TURNED, pixel_kind


class ScoreVisualizer(ImageVisualizer):
    """anomalib's pictures with score and label in the corner, and ``scores.csv``: a line for each image.

    An earlier table becomes ``scores_1.csv`` and so on; of images of the same name each gets a picture.
    """

    def on_test_start(self, trainer: Trainer, *_: object) -> None:
        """Start the table."""
        self.output_dir = Path(self.output_dir or Path(trainer.default_root_dir) / "images")
        self.drawn = getattr(self, "drawn", {})  # image of each picture, of a test and a prediction in one process too
        if trainer.is_global_zero:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            table = self.output_dir / "scores.csv"
            if table.exists():
                table.rename(_free(table))
            table.write_text("path,score,label,threshold,picture\n", encoding="utf-8")

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
            row = [path, f"{score:.4f}", "" if label is None else int(label), f"{threshold:g}", ""]
            if path and pixel_kind(path) not in {EIGHT_BITS, TURNED}:
                item.image_path = None  # or anomalib would draw it black or white
            picture = self.visualize(item)
            if picture is not None and path:
                title = f"{score:.3f}" + ("" if label is None else " anomalous" if label else " normal")
                size = self.text_config.get("size") or 16
                picture = add_text_to_image(picture, title, size=size, position=(10, picture.height - 2 * size))
                target = generate_output_filename(path, self.output_dir, *place)
                if self.drawn.setdefault(target, path) != path:
                    target = _free(target)
                picture.save(target)
                row[-1] = target.relative_to(self.output_dir)
            rows.append(row)
        with (self.output_dir / "scores.csv").open("a", newline="", encoding="utf-8") as table:
            csv.writer(table).writerows(rows)

    def on_predict_end(self, *_: object) -> None:
        """Say where the table is."""
        rank_zero_info(f"Scores and labels are in {self.output_dir / 'scores.csv'}, beside the pictures.")


def _free(path: Path) -> Path:
    """Give the next name with a number that isn't taken."""
    names = (path.with_stem(f"{path.stem}_{number}") for number in count(1))
    return next(name for name in names if not name.exists())
