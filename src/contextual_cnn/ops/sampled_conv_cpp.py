"""The sampled convolution on the CPU in C++ (csrc/sampled_conv.cpp), compiled at first use and kept.

Without a C++ compiler there is one line of notice and the plain torch form takes over, several times slower.
"""

import hashlib
import logging
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from contextual_cnn.ops.compiled_cache import load_cached
from contextual_cnn.ops.memory_format import map_back, output_shape, pixels

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).parent / "csrc" / "sampled_conv.cpp"
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-std=c++20", "-fPIC", "-shared")


@cache
def is_available() -> bool:
    """Whether the kernels are there; compiles them (about ten seconds, once) if they are not."""
    try:
        load_cached(f"sampled_conv_{_key()}", _compile, torch.ops.load_library)
    except (OSError, ValueError, subprocess.SubprocessError) as error:  # ValueError: quotes in CXX that do not match
        reason = getattr(error, "stderr", None) or str(error)
        log.warning(
            "the C++ kernels could not be built (%s); plain torch is used, about 20 times slower on a CPU",
            reason.strip().splitlines()[0],
        )
        return False
    return True


def _key() -> str:
    """Of all that the library depends on; nodes that share a home folder may have different processors."""
    return hashlib.sha256(f"{_SOURCE.read_text()}{_FLAGS}{_processor()}{torch.__version__}".encode()).hexdigest()[:16]


def _compile(library: Path) -> None:
    """Writes the library, or raises what tells why it cannot be made."""
    log.info("compiling the C++ kernels for this processor, once (about ten seconds)")
    torch_folder = Path(torch.__file__).parent
    command = [
        *shlex.split(os.environ.get("CXX", "c++")),
        *_FLAGS,
        *(f"-isystem{torch_folder / 'include' / part}" for part in ("", "torch/csrc/api/include")),
        str(_SOURCE),
        f"-L{torch_folder / 'lib'}",
        *("-ltorch_cpu", "-ltorch", "-lc10"),
        *("-o", str(library)),
    ]
    subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=300)


def _processor() -> str:
    """Name and abilities of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def forward(x: Tensor, weight: Tensor, offset: Tensor | None, mask: Tensor | None, geometry: Sequence[int]) -> Tensor:
    """As `sampled_conv.sampled_conv2d`."""
    y = torch.ops.contextual_cnn_cpu.sampled_conv2d(
        *_inside(x, weight, offset, mask), *output_shape(offset, mask), weight.shape[2:], *geometry
    )
    return y.permute(0, 3, 1, 2).to(x.dtype)


def backward(
    gradient: Tensor, x: Tensor, weight: Tensor, offset: Tensor | None, mask: Tensor | None, geometry: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `sampled_conv.kernel_backward`."""
    inside = _inside(x, weight, offset, mask)
    gx, gw, goffset, gmask = torch.ops.contextual_cnn_cpu.sampled_conv2d_backward(
        pixels(gradient, inside[0].dtype), *inside, weight.shape[2:], *geometry
    )
    return (
        map_back(gx, x),
        gw.view_as(weight).to(weight.dtype),
        map_back(goffset, offset) if offset is not None else x.new_empty(0),
        map_back(gmask, mask) if mask is not None else x.new_empty(0),
    )


def _inside(x: Tensor, weight: Tensor, offset: Tensor | None, mask: Tensor | None) -> tuple:
    """The kernels' layout and type: x (B, H, W, C), weight (B, C, K), offset (B, P, K, 2), mask (B, P, K)."""
    exact = torch.promote_types(x.dtype, torch.float32)
    maps = (pixels(t, exact) if t is not None else None for t in (offset, mask))
    return pixels(x, exact), weight.to(exact).flatten(2).contiguous(), *maps
