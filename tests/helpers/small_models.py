"""Options of timm's that make a backbone small where its size proves nothing.

A stage with a context keeps a block without one (ConvNeXt) and a block whose shortcut is the identity (ResNet).
"""

_OPTIONS = {
    "convnext_atto": {"depths": [1, 1, 2, 1]},
    "convnext_tiny": {"dims": [8, 16, 24, 32]},
    "resnet50": {"layers": [1, 2, 1, 1], "base_width": 32},
}


def small(name: str) -> dict:
    """Of a model or its contextual twin."""
    return _OPTIONS[name.removeprefix("contextual_")]
