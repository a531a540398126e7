"""Who computes an operator of this package: compiled C++ kernels, Triton kernels, or plain torch."""

import logging
import os
from functools import cache
from typing import Literal, get_args

import torch

from contextual_cnn.errors import UserError
from contextual_cnn.ops import sampled_conv_cpp

log = logging.getLogger(__name__)

Implementation = Literal["auto", "cpp", "triton", "torch"]


@torch.compiler.assume_constant_result
def wanted_of(implementation: str) -> str:
    """The name that counts: auto takes what CONTEXTUAL_CNN_OPS in the environment names, if it is there.

    Raises:
        UserError: a name that does not exist.
    """
    source = "implementation"
    if implementation == "auto" and "CONTEXTUAL_CNN_OPS" in os.environ:
        source, implementation = "CONTEXTUAL_CNN_OPS", os.environ["CONTEXTUAL_CNN_OPS"]
    if implementation not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise UserError(f"{source}={implementation} is not one of {known}", f"{source}=auto takes the fastest")
    return implementation


@torch.compiler.assume_constant_result
def choose(wanted: str, device_type: str, dtype: torch.dtype) -> str:
    """cpp, triton or torch: who computes this type on this kind of device.

    Raises:
        UserError: one was insisted on that cannot.
    """
    able = {
        # The Triton kernels add up in float32, which is not enough for float64
        "triton": lambda: _triton_runs_on(device_type) and dtype != torch.float64 and _triton_is_available(),
        "cpp": lambda: device_type == "cpu" and sampled_conv_cpp.is_available(),
        "torch": lambda: True,
    }
    if wanted == "auto":
        # Triton's interpreter is for tests, which name it
        order = ("triton", "torch") if device_type == "cuda" else ("cpp", "torch")
        return next(name for name in order if able[name]())
    if not able[wanted]():
        raise UserError(
            f"the {wanted} kernels cannot compute {dtype} on {device_type} here",
            "CONTEXTUAL_CNN_OPS=auto, or unset, takes what can",
        )
    return wanted


def implementation_on(device: torch.device) -> str:
    """cpp, triton or torch: who computes a model's float32 and bfloat16 maps on this device, in this process.

    Raises:
        UserError: CONTEXTUAL_CNN_OPS names what cannot.
    """
    return choose(wanted_of("auto"), device.type, torch.float32)


def _triton_runs_on(device_type: str) -> bool:
    return device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _triton_is_available() -> bool:
    try:
        import contextual_cnn.ops.sampled_conv_triton  # noqa: F401
    except ImportError as error:
        log.warning("Triton is not available (%s); plain torch is used, several times slower on a GPU", error)
        return False
    return True
