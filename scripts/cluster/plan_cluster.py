"""Days, cost and data bandwidth of a training on 1 to 1,024 GPUs, from the speed that was measured on one.

python scripts/cluster/plan_cluster.py --images-per-second 1200 --intra 200 --inter 40 --price 2.5
python scripts/cluster/plan_cluster.py --measured outputs/ctx_t/dry_run.json --json
"""

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from contextual_cnn.analysis.cluster import (
    FORMULAS,
    Cluster,
    Estimate,
    Training,
    estimate,
    gradient_bytes,
    possible_counts,
)
from contextual_cnn.errors import UserError, run_script
from contextual_cnn.models import build_model
from contextual_cnn.runs.loggers import read_metrics
from contextual_cnn.settings.model import ModelSettings


def main() -> None:
    arguments = parse_arguments()
    training = Training(
        images=arguments.images,
        epochs=arguments.epochs,
        global_batch=arguments.global_batch,
        micro_batch=arguments.micro_batch,
        bytes_per_image=1e3 * arguments.kilobytes,
        gradient_bytes=gradient_bytes(build_model(ModelSettings(name=arguments.model, num_classes=arguments.classes))),
    )
    speed = arguments.images_per_second
    if speed is None:
        speed = measured_speed(arguments.measured, arguments.measured_gpus)
    cluster = Cluster(
        images_per_second=speed,
        gpus_per_node=arguments.gpus_per_node,
        intra_node=1e9 * arguments.intra,
        inter_node=1e9 * arguments.inter,
        overlap=arguments.overlap,
        floor=1e-3 * arguments.floor_ms,
        copy=1e9 * arguments.copy,
        price=arguments.price,
    )
    rows = [estimate(gpus, training, cluster) for gpus in arguments.gpus or possible_counts(arguments.global_batch)]
    if arguments.json:
        plan = {"training": asdict(training), "cluster": asdict(cluster), "rows": [asdict(row) for row in rows]}
        print(json.dumps(plan, indent=2))
    else:
        Console().print(table(rows, arguments.model, training, cluster))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        epilog=f"formulas:\n{FORMULAS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    speed = parser.add_mutually_exclusive_group(required=True)
    speed.add_argument("--images-per-second", type=float, metavar="S", help="of one GPU, in training")
    speed.add_argument(
        "--measured", type=Path, metavar="FILE", help="a dry_run.json or a metrics.jsonl to take it from"
    )
    parser.add_argument("--measured-gpus", type=int, metavar="N", help="processes that wrote the metrics.jsonl")
    parser.add_argument("--model", default="contextual_convnext_tiny", help="gradient bytes are counted on it")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--images", type=int, default=1_281_167, help="of the training split (default: ImageNet's)")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--global-batch", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=128)
    parser.add_argument("--kilobytes", type=float, default=115.4, help="of an image on the disk (ImageNet: 115.4)")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--intra", type=float, default=200, help="GB/s of an all-reduce in a node, busbw (200)")
    parser.add_argument("--inter", type=float, default=20, help="GB/s of an all-reduce between nodes, busbw (20)")
    parser.add_argument("--overlap", type=float, default=0.5, help="share of the all-reduce that is hidden (0.5)")
    parser.add_argument("--floor-ms", type=float, default=12, help="of a micro-batch, however small it is (12)")
    parser.add_argument("--copy", type=float, default=10, help="GB/s from a GPU to its host (10)")
    parser.add_argument("--price", type=float, default=2.0, help="of a GPU for an hour (2.0)")
    parser.add_argument("--gpus", type=int, nargs="+", metavar="N", help="default: 1 2 4 .. 1024, as the batch allows")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser.parse_args()


def measured_speed(path: Path, gpus: int | None) -> float:
    """Images/s of one GPU; of a metrics.jsonl the median of its rows.

    Raises:
        UserError: the file has none, or does not say of how many GPUs.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}", "--measured outputs/NAME/dry_run.json (trainer.dry_run=true)")
    if path.suffix == ".jsonl":
        if gpus is None or gpus < 1:
            raise UserError(f"{path} does not say how many processes wrote it", "--measured-gpus N")
        speeds = [row["train/images_per_second"] for row in read_metrics(path) if "train/images_per_second" in row]
        if not speeds:
            raise UserError(f"{path} has no train/images_per_second", "a run of some steps, or --images-per-second")
        return statistics.median(speeds) / gpus
    try:
        forecast = json.loads(path.read_text())
        return forecast["images_per_second"] / forecast["processes"]
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path} is no dry_run.json: {error!r}", "python train.py trainer.dry_run=true ...") from error


def table(rows: list[Estimate], model: str, training: Training, cluster: Cluster) -> Table:
    result = Table(
        title=f"{model}: {training.epochs} epochs of {training.images} images, {training.global_batch} a step, "
        f"{training.gradient_bytes / 1e6:.0f} MB of gradients, {cluster.images_per_second:g} images/s on one GPU"
    )
    for column in (
        "GPUs",
        "nodes",
        "images\neach",
        "in a\nnorm",
        "step\nms",
        "reduce\nms",
        "effi-\nciency",
        "days",
        "cost",
    ):
        result.add_column(column, justify="right")
    result.add_column("storage\nGB/s", justify="right")
    for row in rows:
        result.add_row(
            f"{row.gpus}",
            f"{row.nodes}",
            f"{row.images_per_gpu}",
            f"{row.norm_images}",
            f"{1e3 * row.step:.1f}",
            f"{1e3 * row.all_reduce:.1f}",
            f"{100 * row.efficiency:.1f} %",
            f"{row.days:.3g}",
            f"{row.cost:.0f}",
            f"{row.storage / 1e9:.2f}",
        )
    result.caption = (
        f"{100 * cluster.overlap:g} % of the all-reduce hidden where the backward pass is long enough; latency, "
        "evaluations and slow nodes not included: the best case (--help has the formulas)"
    )
    return result


if __name__ == "__main__":
    run_script(main)
