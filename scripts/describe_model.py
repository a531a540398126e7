"""Prints parameters and multiply-adds of contextual models, plain twins and peers beside the published figures.

python scripts/describe_model.py [--json] [--image-size 224] [--num-classes 1000]
"""

import argparse
import json

from rich.console import Console
from rich.table import Table

from contextual_cnn.analysis.cost import count_cost
from contextual_cnn.models import build_model

# Twin, peers of its size in the paper's table 1, and the top-1 that the paper's text gives for the contextual model
FAMILIES = {
    "convnext_atto": ((), None),
    "convnext_tiny": (("regnety_040", "swin_tiny_patch4_window7_224"), 82.1 + 1.8),
    "convnext_small": (("regnety_080", "swin_small_patch4_window7_224"), 83.1 + 1.5),
    "convnext_base": (("regnety_160", "swin_base_patch4_window7_224"), 83.8 + 1.4),
    "resnet50": ((), None),
}
TOP1 = {"convnext_tiny": 82.1, "convnext_small": 83.1, "convnext_base": 83.8}  # the paper's, of the plain twins
RELEASED = {"contextual_convnext_tiny": "33.95 M parameters"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--num-classes", type=int, default=1000)
    arguments = parser.parse_args()
    rows = [row for twin in FAMILIES for row in describe_family(twin, arguments)]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        Console(width=150).print(table(rows, arguments.image_size))


def describe_family(twin: str, arguments: argparse.Namespace) -> list[dict]:
    """The plain twin, its peers, and the contextual model, in that order."""
    peers, top1 = FAMILIES[twin]
    names = [twin, *(peers if arguments.image_size == 224 else ()), f"contextual_{twin}"]  # Swin has a fixed size
    rows = [describe(name, arguments) for name in names]
    for row in rows:
        row["vs_twin"] = row["macs"] / rows[0]["macs"]
        row["vs_twin_with_interpolation"] = (row["macs"] + row["interpolation"]) / rows[0]["macs"]
        row["vs_twin_batch_of_1"] = (row["macs"] + row["per_batch"]) / rows[0]["macs"]
    rows[0]["paper_top1"], rows[-1]["paper_top1"] = TOP1.get(twin), top1
    return rows


def describe(name: str, arguments: argparse.Namespace) -> dict:
    model = build_model(name=name, num_classes=arguments.num_classes)
    return {"model": name, **count_cost(model, arguments.image_size)._asdict(), "paper_top1": None}


def table(rows: list[dict], image_size: int) -> Table:
    result = Table(title=f"Multiply-adds for an image of {image_size} x {image_size}")
    for column in ("model", "parameters", "GMACs", "vs twin", "with bilinear", "batch of 1", "paper's top-1"):
        result.add_column(column, justify="left" if column == "model" else "right")
    result.add_column("released code")
    for row in rows:
        contextual = row["model"].startswith("contextual")
        ratios = [row[key] for key in ("vs_twin", "vs_twin_with_interpolation", "vs_twin_batch_of_1")]
        result.add_row(
            row["model"],
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['macs'] / 1e9:.3f}",
            *(f"{100 * (ratio - 1):+.1f} %" if contextual else "" for ratio in ratios),
            f"{row['paper_top1']:.1f}" if row["paper_top1"] else "",
            RELEASED.get(row["model"], ""),
            end_section=contextual,
        )
    result.caption = (
        "vs twin: the paper says +3 % for the tiny model; with bilinear: also the four multiply-adds of each sampled "
        "value; batch of 1: also the products with the class table, which a batch of any size needs once"
    )
    return result


if __name__ == "__main__":
    main()
