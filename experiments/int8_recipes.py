"""What INT8 was chosen from: trained models quantised by other recipes and tested again, a CSV row each.

python -m experiments.int8_recipes experiments/configs/rdpp_real.yaml --data mtd --models RD++ --seed 1

Rows go beside those of ``python -m anomalib_rdpp.benchmark precision``, whose "int8" is what an export gives.
"""

from collections.abc import Sequence
from pathlib import Path

import nncf
import openvino as ov
import torch
from nncf.quantization.range_estimator import RangeEstimatorParametersSet

from anomalib_rdpp.benchmark.cli import run
from anomalib_rdpp.benchmark.exports import export
from anomalib_rdpp.benchmark.grid import refuse_unknown
from anomalib_rdpp.benchmark.precision import Answer, Trained, each_trained, precision_results, precision_table
from anomalib_rdpp.benchmark.probe import load_runner
from anomalib_rdpp.export import quantize

RECIPES = {
    "int8, NNCF's ranges": {
        "advanced_parameters": nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
    },
    "int8, 8 bits of weights": {
        "advanced_parameters": nncf.AdvancedQuantizationParameters(
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
        )
    },
    "int8, mixed preset": {"preset": nncf.QuantizationPreset.MIXED},
    "int8, map too": {"ignored_scope": nncf.IgnoredScope()},
}


def run_recipes(
    grid: Path,
    results: Path = Path("results"),
    output: Path = Path("results/precision.csv"),
    seed: int = 0,
    data: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    recipes: Sequence[str] = tuple(RECIPES),
) -> str:
    """Test an accuracy grid's trained models in INT8 by other recipes.

    Args:
        grid: YAML grid that ``accuracy`` was given.
        results: Folder of its CSV, where the checkpoints are.
        output: CSV file, appended to; rows that are there are not run again.
        seed: Of the runs.
        data: Names of the grid's data, all by default.
        models: Names of the grid's models, all by default.
        recipes: Which, all by default.

    Returns:
        A Markdown table of the CSV.
    """
    refuse_unknown(recipes, RECIPES)
    rows = precision_results(output)
    for row, trained in each_trained(grid, results, rows, seed, data, models, recipes):
        with rows.run(row):
            answer = _quantised(trained, row["precision"])
            rows.append({**row, **trained.test(answer, f"{row['data']}, {row['model']}, {row['precision']}")})
    return precision_table(rows)


def _quantised(trained: Trained, recipe: str) -> Answer:
    """Give the model by a recipe."""
    path = export(trained.model, "fp32", trained.folder, trained.size, trained.calibration)
    network = quantize(ov.Core().read_model(path), trained.datamodule, **RECIPES[recipe])
    path = path.with_name("recipe.xml")
    ov.save_model(network, path, compress_to_fp16=False)
    return load_runner(path, torch.get_num_threads(), trained.size, "f32")


if __name__ == "__main__":
    run("python -m experiments.int8_recipes", run_recipes)
