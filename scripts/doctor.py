"""Looks whether this machine can train: python scripts/doctor.py

A row for each thing that is needed or that helps, with one line of advice where something is wrong. Ends with status 1
if something necessary is missing.
"""

import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
_SHARED_MEMORY = 0.32  # GiB a GPU: 8 workers that hold 2 batches of 128 images ready
REQUIRED = ("torch", "torchvision", "timm", "hydra-core", "omegaconf", "wandb", "safetensors", "rich", "matplotlib")


class Row(NamedTuple):
    """advice: None where all is well. necessary: whether nothing works without it."""

    name: str
    found: str
    advice: str | None = None
    necessary: bool = False


def main() -> None:
    rows = [row for check in CHECKS for row in run(check)]
    width = max(len(row.name) for row in rows)
    for row in rows:
        status = "ok  " if row.advice is None else "FAIL" if row.necessary else "warn"
        print(f"{status}  {row.name:{width}}  {row.found}")
        if row.advice is not None:
            print(f"      {'':{width}}  -> {row.advice}")
    sys.exit(any(row.advice is not None and row.necessary for row in rows))


def run(check: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """A check that breaks is a finding, too: whatever is wrong with a package shows when it is used."""
    try:
        yield from check()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        yield Row(check.__name__, f"{type(error).__name__}: {reason}", "put the rows above right first", necessary=True)


def python() -> Iterator[Row]:
    good = (3, 11) <= sys.version_info[:2] < (3, 13)
    found = f"{sys.version.split()[0]}, {sys.executable}"
    yield Row("Python", found, None if good else "use Python 3.11 or 3.12", necessary=True)


def packages() -> Iterator[Row]:
    tested = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )  # the versions that were tested together
    for name in REQUIRED:
        found = installed(name)
        if found is None:
            yield Row(name, "missing", "pip install -c constraints.txt -e .", necessary=True)
        elif name in tested and found.split("+")[0] != tested[name]:
            yield Row(name, found, f"tested with {tested[name]}: pip install -c constraints.txt -e .")
        else:
            yield Row(name, found)
    for module in ("torchvision.ops", "timm", "contextual_cnn.models"):
        try:
            importlib.import_module(module)
        except Exception as error:
            reason = str(error).splitlines()[0]
            advice = "torch and torchvision must be builds of the same kind: reinstall both with constraints.txt"
            yield Row(f"import {module}", f"{type(error).__name__}: {reason}", advice, necessary=True)


def gpus() -> Iterator[Row]:
    import torch

    from contextual_cnn.device import choose_device, has_bf16, why_too_old
    from contextual_cnn.errors import UserError

    if not torch.cuda.is_available():
        try:
            choose_device("auto", 0)
        except UserError as error:  # there is one, and torch cannot use it
            yield Row("GPU", error.cause, error.fix, necessary=True)
            return
        why = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Row("GPU", f"none; {why}", "a CPU is enough for tests only; with a GPU here, see what nvidia-smi says")
        return
    yield Row("CUDA", f"{torch.version.cuda}, as torch was built")
    for i in range(torch.cuda.device_count()):
        device, properties = torch.device("cuda", i), torch.cuda.get_device_properties(i)
        found = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
        if too_old := why_too_old(device):
            yield Row(f"GPU {i}", found, too_old, necessary=True)
        else:
            yield Row(f"GPU {i}", found, None if has_bf16(device) else "no bfloat16: trainer.precision=fp32")
    several = torch.cuda.device_count() > 1
    nccl = torch.distributed.is_nccl_available()
    found = ".".join(map(str, torch.cuda.nccl.version())) if nccl else "missing"
    yield Row("NCCL", found, None if nccl or not several else "several GPUs need a torch with NCCL: reinstall torch")


def dali() -> Iterator[Row]:
    import torch

    real = next((name for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120") if installed(name)), None)
    if real is None:
        extra = "dali-cu12" if (torch.version.cuda or "13").startswith("12") else "dali-cu13"
        placeholder = "; nvidia-dali is an empty placeholder" if installed("nvidia-dali") else ""
        yield Row("DALI", f"missing{placeholder}", f"pip install -e '.[{extra}]', or train with data.loader=torch")
        return
    try:
        importlib.import_module("nvidia.dali.fn")
    except Exception as error:
        yield Row("DALI", f"{real} {installed(real)}: {error}", f"reinstall {real}, or train with data.loader=torch")
        return
    yield Row("DALI", f"{real} {installed(real)}")


def kernels() -> Iterator[Row]:
    import torch

    from contextual_cnn.ops import sampled_conv_cpp

    if torch.cuda.is_available():
        found = installed("triton")
        advice = None if found else "pip install triton; plain torch takes its place, several times slower"
        yield Row("Triton", found or "missing", advice)
    compiler = shutil.which("c++")
    works = compiler is not None and sampled_conv_cpp.is_available()
    found = f"{compiler}, kernels {'compiled' if works else 'do not compile'}" if compiler else "no compiler"
    yield Row(
        "C++ kernels", found, None if works else "install g++ with OpenMP; only CPUs need it, 20 times slower without"
    )


def wandb_login() -> Iterator[Row]:
    from contextual_cnn.runs.wandb_logger import has_wandb_key

    mode = os.environ.get("WANDB_MODE")
    if mode or has_wandb_key():
        yield Row("W&B", f"WANDB_MODE={mode}" if mode else "logged in")
    else:
        yield Row("W&B", "no API key", "`wandb login`; without it runs are kept offline, logger=local turns W&B off")


def machine() -> Iterator[Row]:
    import torch

    cores, cards = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    advice = "decoding will limit the training: 8 cores or more for each GPU" if cores < 8 * cards else None
    yield Row("CPU cores", f"{cores}, for {cards} GPUs", advice)
    free = shutil.disk_usage(Path.cwd()).free / GIB
    advice = "checkpoints take up to 2.5 GB a run: output_dir=FOLDER on another disk" if free < 10 else None
    yield Row("disk", f"{free:.0f} GiB free in {Path.cwd()}", advice, necessary=free < 1)
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).free / GIB
        needed = max(1.0, cards * _SHARED_MEMORY)
        advice = f"data.loader=torch and NCCL need {needed:.1f} GiB: docker run --shm-size=8g, or --ipc=host"
        yield Row("shared memory", f"{size:.1f} GiB free", advice if size < needed else None)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


CHECKS = (python, packages, gpus, dali, kernels, wandb_login, machine)

if __name__ == "__main__":
    main()
