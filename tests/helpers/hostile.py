"""Files that nobody should have written: whole by their manifest, and not what they should be."""

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from contextual_cnn.runs.checkpoint import Manifest


def write_whole(content: Any, path: Path, **options: Any) -> Path:
    """What torch.save makes of it, with a manifest that fits."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return write_bytes(buffer.getvalue(), path)


def write_bytes(data: bytes, path: Path, step: int = 7) -> Path:
    path.write_bytes(data + Manifest(len(data), hashlib.sha256(data).hexdigest(), step).line())
    return path


def compressed(content: Any) -> bytes:
    """What torch.save makes of it, in a zip file that is deflated."""
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save(content, plain)
    with zipfile.ZipFile(plain) as before, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as after:
        for name in before.namelist():
            after.writestr(name, before.read(name))
    return packed.getvalue()
