"""The device of a process: chosen, refused where it cannot do the work, set up alike for training and evaluation."""

import os
from pathlib import Path

import torch

from contextual_cnn.errors import UserError
from contextual_cnn.launcher import cores

_DRIVER = Path("/dev/nvidiactl")  # there as soon as NVIDIA's driver is loaded, whatever its version


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device of a process; a GPU becomes the current one.

    Args:
        name: "auto" (a GPU where there is one), "cuda" or "cpu".

    Raises:
        UserError: there is no such GPU, or torch cannot use it. A CPU never takes its place unasked: it would train
            for weeks.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available() and not _should_see_a_gpu()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"trainer.device={name}, but torch {torch.__version__} sees no GPU{_why_not()}",
            "see what nvidia-smi says, and python scripts/doctor.py; trainer.device=cpu trains without",
        )
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: torch sees {torch.cuda.device_count()} on this node",
            f"torchrun --nproc-per-node {torch.cuda.device_count()}",
        )
    device = torch.device("cuda", local_rank)
    if too_old := why_too_old(device):
        raise UserError(too_old, "a torch that was built for this GPU (pytorch.org/get-started), or trainer.device=cpu")
    torch.cuda.set_device(device)
    return device


def why_too_old(device: torch.device) -> str | None:
    """What is to be said of a GPU for which this torch has no code; None of any other."""
    capability = torch.cuda.get_device_capability(device)
    built_for = [name.partition("_")[2] for name in torch.cuda.get_arch_list()]  # sm_75, compute_120
    oldest = min((_capability(name) for name in built_for), default=capability)
    if capability >= oldest:
        return None
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, and "
        f"torch {torch.__version__} is built for {oldest[0]}.{oldest[1]} and later"
    )


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is computed by the hardware; some GPUs emulate it, more slowly than float32."""
    # A CPU that emulates it is asked for it on purpose; GPUs have it since Ampere
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def memory_in_use(device: torch.device) -> int:
    """Bytes of a GPU that are taken: by torch and its cache, and by what torch does not count (DALI, NCCL, CUDA)."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def share_compilers() -> None:
    """Inductor starts as many compilers as the machine has cores; the processes of a node share these.

    Before torch.compile is called.
    """
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(cores()))


def set_up_arithmetic() -> None:
    """How every step and every evaluation computes: TF32 products of float32, the fastest algorithm of cuDNN.

    One place, so that evaluate.py finds the figures of the training again.
    """
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True


def _should_see_a_gpu() -> bool:
    """A driver is loaded, and torch is built for it: that it cannot be used is a defect of the machine."""
    return torch.version.cuda is not None and _DRIVER.exists()


def _why_not() -> str:
    """torch.cuda.is_available() hides the driver's own words."""
    if torch.version.cuda is None:
        return ": it is built without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:  # RuntimeError, AssertionError, whatever the driver's library leads to
        return f": it is built for CUDA {torch.version.cuda}; {str(error).splitlines()[0]:.200}"
    return ""


def _capability(name: str) -> tuple[int, int]:
    """90 -> (9, 0); 120 -> (12, 0); 90a -> (9, 0)."""
    digits = name.rstrip("af")
    return int(digits[:-1]), int(digits[-1])
