"""Prints parameters and multiply-adds of the contextual models and their plain twins beside the published figures.

python scripts/describe_model.py [--json] [--image-size 224] [--num-classes 1000]
"""

import argparse
import json

from rich.console import Console
from rich.table import Table

from contextual_cnn.analysis.cost import count_cost
from contextual_cnn.models import build_model

# What the paper's text says (its tables did not survive extraction), and what the released code builds
PAPER = {"tiny": "+3 %; top-1 +1.8", "small": "top-1 +1.5", "base": "top-1 +1.4"}
RELEASED = {"tiny": "33.95 M parameters"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--num-classes", type=int, default=1000)
    arguments = parser.parse_args()
    rows = [describe(size, arguments) for size in ("atto", "tiny", "small", "base")]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        Console(width=150).print(table(rows, arguments.image_size))


def describe(size: str, arguments: argparse.Namespace) -> dict:
    plain, contextual = (
        count_cost(build_model(name=name, num_classes=arguments.num_classes), arguments.image_size)
        for name in (f"convnext_{size}", f"contextual_convnext_{size}")
    )
    return {
        "size": size,
        "plain": plain._asdict(),
        "contextual": contextual._asdict(),
        "macs_ratio": contextual.macs / plain.macs,
        "macs_ratio_with_interpolation": (contextual.macs + contextual.interpolation) / plain.macs,
        "macs_ratio_batch_of_1": (contextual.macs + contextual.per_batch) / plain.macs,
    }


def table(rows: list[dict], image_size: int) -> Table:
    result = Table(title=f"Multiply-adds for an image of {image_size} x {image_size}")
    for column in ("model", "parameters", "GMACs", "vs plain", "with bilinear", "batch of 1"):
        result.add_column(column, justify="left" if column == "model" else "right")
    for column in ("paper (its text)", "released code"):
        result.add_column(column)
    for row in rows:
        plain, contextual, size = row["plain"], row["contextual"], row["size"]
        result.add_row(f"convnext_{size}", f"{plain['parameters'] / 1e6:.2f} M", f"{plain['macs'] / 1e9:.3f}")
        ratios = (row["macs_ratio"], row["macs_ratio_with_interpolation"], row["macs_ratio_batch_of_1"])
        result.add_row(
            f"contextual_convnext_{size}",
            f"{contextual['parameters'] / 1e6:.2f} M",
            f"{contextual['macs'] / 1e9:.3f}",
            *(f"{100 * (ratio - 1):+.1f} %" for ratio in ratios),
            PAPER.get(size, "-"),
            RELEASED.get(size, "-"),
            end_section=True,
        )
    result.caption = (
        "with bilinear: also the four multiply-adds of each sampled value; batch of 1: also the products with the "
        "class table, which a batch of any size needs once"
    )
    return result


if __name__ == "__main__":
    main()
