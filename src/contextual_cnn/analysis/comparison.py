"""The rows of the paper's table 1: contextual models beside their plain twins and peers of their size from timm."""

from contextual_cnn.analysis.cost import count_cost, count_detector_cost
from contextual_cnn.models import build_model
from contextual_cnn.models.detector import build_detector
from contextual_cnn.settings.detector import DetectorSettings
from contextual_cnn.settings.model import ModelSettings

# Twin, peers of its size in the paper's table 1, and the top-1 that the paper's text gives for the contextual model
FAMILIES = {
    "convnext_atto": ((), None),
    "convnext_tiny": (("regnety_040", "swin_tiny_patch4_window7_224"), 82.1 + 1.8),
    "convnext_small": (("regnety_080", "swin_small_patch4_window7_224"), 83.1 + 1.5),
    "convnext_base": (("regnety_160", "swin_base_patch4_window7_224"), 83.8 + 1.4),
    "resnet50": ((), None),
}
TOP1 = {"convnext_tiny": 82.1, "convnext_small": 83.1, "convnext_base": 83.8}  # the paper's, of the plain twins


def describe_family(twin: str, image_size: int = 224, num_classes: int = 1000, frames: int = 1) -> list[dict]:
    """The plain twin, its peers, and the contextual model, in that order.

    Args:
        frames: of a clip, whose shifts move numbers and multiply none. The products with the class table are counted
            for a batch of one of them.
    """
    peers, top1 = FAMILIES[twin]
    names = [twin, *(peers if image_size == 224 else ()), f"contextual_{twin}"]  # Swin has a fixed size
    rows = [_describe(name, image_size, num_classes) for name in names]
    for row in rows:
        row["macs"], row["interpolation"] = frames * row["macs"], frames * row["interpolation"]
        row["vs_twin"] = row["macs"] / rows[0]["macs"]
        row["vs_twin_with_interpolation"] = (row["macs"] + row["interpolation"]) / rows[0]["macs"]
        row["vs_twin_batch_of_1"] = (row["macs"] + row["per_batch"]) / rows[0]["macs"]
    rows[0]["paper_top1"], rows[-1]["paper_top1"] = TOP1.get(twin), top1
    return rows


def describe_detectors(twin: str) -> list[dict]:
    """Mask R-CNN of 80 classes on the plain twin and on the contextual model, at 1280 x 800 pixels."""
    rows = []
    for name in (twin, f"contextual_{twin}"):
        model = build_detector(ModelSettings(name=name, num_classes=1000), DetectorSettings(), 80)
        rows.append({"model": name, **count_detector_cost(model)._asdict()})
    return [row | {"vs_twin": row["macs"] / rows[0]["macs"]} for row in rows]


def _describe(name: str, image_size: int, num_classes: int) -> dict:
    model = build_model(ModelSettings(name=name, num_classes=num_classes))
    return {"model": name, **count_cost(model, image_size)._asdict(), "paper_top1": None}
