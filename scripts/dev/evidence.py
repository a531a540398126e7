"""Trains the variants of the paper's table 4 on a small data set, several seeds each, and prints the table.

python scripts/dev/evidence.py [OVERRIDE ...] [--data glyphs fashion photographs] [--variants a1 a2 ...] [--seeds 0 1 2]

Photographs are yours to bring: data.root=ROOT with class folders or shards, for a hundred classes at 64 px.

Each run is `train.py experiment=evidence_DATA` with the overrides of its variant, in a folder of its own; one that is
complete is not repeated, one that was interrupted goes on. A variant's figure is the EMA's top-1 after the last epoch:
nothing is chosen on the val split. The spread is the standard deviation over the seeds.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from contextual_cnn.errors import run_script
from contextual_cnn.runs.environment import environment, print_report
from contextual_cnn.runs.loggers import read_metrics

ROOT = Path(__file__).parents[2]
DATA = ("glyphs", "fashion", "photographs")
CURES = ["model.context_init=trunc_normal", "model.generator_norm=batch", "model.generator_width=8"]
VARIANTS = {
    "a1": ("plain twin", ["model.convolution=plain"]),
    "a1-wide": ("plain, of a5's multiply-adds", ["model.convolution=plain"]),
    "a2": ("the context as extra input", ["model.convolution=extra_input"]),
    "a3": ("contextual convolutions without the prior", ["model.convolution=without_prior"]),
    "a5": ("contextual convolutions", []),
    "a5-reduce": ("a5 with the paper's selection", ["model.selection=reduce"]),
    "a5-layer": ("a5 with the paper's norm of the projection", ["model.projection_norm=layer"]),
    "a5-short": ("a5 with shorter shortlists", []),
    "a5-blind": ("a5 with the same context for all images", ["model.context_of=blind"]),
    "a5-told": ("a5 with the true class in every shortlist", ["model.context_of=told"]),
    "cures": ("a5 with a context that is easier to read", CURES),
    "cures-blind": ("cures with the same context for all images", [*CURES, "model.context_of=blind"]),
    "cures-told": ("cures with the true class in every shortlist", [*CURES, "model.context_of=told"]),
}
# What a variant changes depends on the data: its overrides there
BY_DATA = {
    "a1-wide": {
        "glyphs": "model.timm_options.dims=[29,58,116,232]",
        "fashion": "model.timm_options.dims=[29,58,116,232]",
        "photographs": "model.timm_options.dims=[35,70,140,280]",
    },
    "a5-short": {
        "glyphs": "model.class_counts=[20,10,5]",
        "fashion": "model.class_counts=[4,3,2]",
        "photographs": "model.class_counts=[9,3,1]",
    },
}
METRICS = ["val_ema/top1", *(f"val_ema/recall_stage{stage}" for stage in (1, 2, 3))]


def main() -> None:
    arguments = parse_arguments()
    rows = [
        {"data": data, "variant": variant, "what": VARIANTS[variant][0]}
        | summary([train(arguments, data, variant, seed) for seed in arguments.seeds])
        for data in arguments.data
        for variant in arguments.variants
    ]
    show(rows)
    report = {"environment": environment(), "seeds": arguments.seeds, "overrides": arguments.overrides, "results": rows}
    print_report(report, arguments.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="for every run, as schedule.epochs=2")
    parser.add_argument("--data", nargs="+", choices=DATA, default=["glyphs", "fashion"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("outputs/evidence"), help="of the runs")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args()


def train(arguments: argparse.Namespace, data: str, variant: str, seed: int) -> dict[str, float]:
    """The last evaluation of a run."""
    name = f"{data}_{variant}_{seed}"
    own = [f"experiment=evidence_{data}", f"output_dir={arguments.folder}", f"run_name={name}", f"seed={seed}"]
    own += VARIANTS[variant][1]
    if variant in BY_DATA:
        own.append(BY_DATA[variant][data])
    # Its log belongs to the terminal, standard output to the JSON
    subprocess.run([sys.executable, str(ROOT / "train.py"), *own, *arguments.overrides], check=True, stdout=sys.stderr)
    return [row for row in read_metrics(arguments.folder / name / "metrics.jsonl") if METRICS[0] in row][-1]


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and spread of each metric over the seeds; recalls only where the model has stages to recall."""
    values = {name: [run[name] for run in runs] for name in METRICS if name in runs[0]}
    found = {name: {"mean": statistics.mean(each), "each": each} for name, each in values.items()}
    for each in found.values():
        each["deviation"] = statistics.stdev(each["each"]) if len(runs) > 1 else None
    return found


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("data", "", "variant", "top-1", "recall after stages 1 / 2 / 3")
    for row in rows:
        recalls = [f"{row[name]['mean']:.1f}" for name in METRICS[1:] if name in row]
        deviation = row[METRICS[0]]["deviation"]
        top1 = f"{row[METRICS[0]]['mean']:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")
        table.add_row(row["data"], row["variant"], row["what"], top1, " / ".join(recalls) or "-")
    Console(stderr=True).print(table)


if __name__ == "__main__":
    run_script(main)
