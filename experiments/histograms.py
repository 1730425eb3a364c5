"""Pictures of an analysis: scores, map values, and distances of features."""

from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from .features import SCALES

BINS = 60


class Analysis(NamedTuple):
    """Values behind the figures of one model."""

    normal_scores: np.ndarray
    abnormal_scores: np.ndarray
    normal_pixels: np.ndarray
    abnormal_pixels: np.ndarray
    distances: dict[str, np.ndarray]  # by column of FIGURES, of each pair or noisy position; empty without a student


def draw_histograms(analyses: dict[str, Analysis], path: Path) -> Path:
    """Draw a row per model: scores, pixels, and of the family's features pairs and noise, on one axis for all."""
    panels = {name: _panels(analysis) for name, analysis in analyses.items()}
    titles = list(dict.fromkeys(title for own in panels.values() for title in own))
    figure, axes = plt.subplots(
        *(len(panels), len(titles)),
        figsize=(3.2 * len(titles), 0.4 + 1.9 * len(panels)),
        squeeze=False,
        layout="constrained",
    )
    for column, title in enumerate(titles):
        everyone = [values for own in panels.values() for values in own.get(title, {}).values()]
        common = np.histogram_bin_edges(np.concatenate(everyone), BINS)
        for row, (name, own) in zip(axes, panels.items(), strict=True):
            axis = row[column]
            if title not in own:
                axis.set_axis_off()
                continue
            is_comparable = title.startswith("feature")
            edges = common if is_comparable else np.histogram_bin_edges(np.concatenate(list(own[title].values())), BINS)
            for (label, values), colour in zip(own[title].items(), ("tab:blue", "tab:red"), strict=True):
                axis.hist(values, edges, density=True, histtype="stepfilled", alpha=0.55, color=colour, label=label)
            axis.set_title(f"{name}: {title}", fontsize=8)
            axis.set_yscale("log" if title.startswith("map") else "linear")
            axis.set_yticks([])
            axis.minorticks_off()
            axis.tick_params(labelsize=7)
            axis.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


def _panels(analysis: Analysis) -> dict[str, dict[str, np.ndarray]]:
    """Values of each histogram by title and label."""
    panels = {"image scores": {"normal": analysis.normal_scores, "abnormal": analysis.abnormal_scores}}
    if len(analysis.abnormal_pixels):
        panels["map, log"] = {"normal pixels": analysis.normal_pixels, "abnormal pixels": analysis.abnormal_pixels}
    if analysis.distances:
        scales = {
            name: [analysis.distances[f"{name}_{scale}"] for scale in SCALES]
            for name in ("student_normal", "student_abnormal", "teacher_noise", "student_noise")
        }
        panels["feature distance of pairs"] = {
            "normal, normal": np.mean(scales["student_normal"], axis=0),
            "abnormal, normal": np.mean(scales["student_abnormal"], axis=0),
        }
        panels["feature change at noise"] = {
            "teacher": np.concatenate(scales["teacher_noise"]),
            "student sees": np.concatenate(scales["student_noise"]),
        }
    return panels
