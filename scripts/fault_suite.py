"""Does to the real train.py and evaluate.py what clusters, disks and people do: python scripts/fault_suite.py [ID ...]

Prints a table (fault, what happened, verdict); --output FILE writes it as JSON. A row is a function in ROWS.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from contextual_cnn.engine.checkpoint import Manifest, load_checkpoint, step_of
from contextual_cnn.engine.environment import environment, print_report
from contextual_cnn.engine.loggers import read_metrics

ROOT = Path(__file__).parent.parent
ROWS: dict[str, tuple[str, Callable[["Bench"], str]]] = {}


def row(name: str, fault: str) -> Callable:
    """Enters a function into the table: it does the fault, asserts what must hold and returns what happened."""

    def enter(function: Callable[["Bench"], str]) -> Callable[["Bench"], str]:
        ROWS[name] = (fault, function)
        return function

    return enter


class Bench:
    """One row's own folder, and the commands on a small data set. `images` and `straight` are shared by all rows.

    straight: the folder of an uninterrupted run, to compare with.
    """

    def __init__(self, folder: Path, images: Path, straight: Path | None) -> None:
        self.folder, self.images, self.straight = folder, images, straight
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run = folder / "run"
        self.last = self.run / "checkpoints" / "last.pt"

    def command(self, *overrides: str) -> list[str]:
        sizes = "model.layer_scale=0.1 data.image_size=32 data.threads=1 data.eval_batch_size=6"
        length = "schedule.epochs=4 schedule.warmup_epochs=1 trainer.log_every=1 trainer.ema_decay=0.9"
        batch = "trainer.device=cpu trainer.global_batch_size=16 trainer.micro_batch_size=8 logger=local"
        own = [f"data.root={self.images}", f"output_dir={self.folder}", "run_name=run"]
        return ["train.py", "model=contextual_convnext_atto", *f"{sizes} {length} {batch}".split(), *own, *overrides]

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen:
        self.output = (self.folder / "output").open("w+")
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "WANDB_MODE": "offline", **variables}
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=env, stdout=self.output, stderr=subprocess.STDOUT
        )

    def train(self, *overrides: str, **variables: str) -> tuple[int, str]:
        """Exit status and output of a whole run."""
        status = self.start(*self.command(*overrides), **variables).wait(300)
        return status, self.printed

    @property
    def printed(self) -> str:
        return (self.folder / "output").read_text()

    @property
    def step(self) -> int:
        return max((line["step"] for line in read_metrics(self.run / "metrics.jsonl")), default=0)

    def wait_for_step(self, step: int, process: subprocess.Popen) -> None:
        while self.step < step:
            assert process.poll() is None, self.printed
            time.sleep(0.02)

    def assert_same_end(self) -> None:
        """The weights, averages and moments of the uninterrupted run, bit for bit."""
        mine, theirs = (load_checkpoint(run / "checkpoints" / "last.pt") for run in (self.run, self.straight / "run"))
        assert mine["step"] == theirs["step"]
        moments = [s["optimizer"]["state"] for s in (mine, theirs)]
        pairs = [(mine["model"], theirs["model"]), (mine["ema"], theirs["ema"])]
        pairs += [(moments[0][key], moments[1][key]) for key in moments[1]]
        assert all(torch.equal(one[name], other[name]) for one, other in pairs for name in other)


@row("kill", "kill -9 at random moments, and the newest checkpoint damaged each time")
def _(bench: Bench) -> str:
    draw, kills, fell_back = random.Random(0), 0, 0
    while kills < 5:
        process = bench.start(*bench.command("checkpoint.every_steps=1"))
        while process.poll() is None and "run folder" not in bench.printed:
            time.sleep(0.02)
        time.sleep(draw.uniform(0.5, 2.0))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
        if (bench.last.parent / "previous.pt").exists():
            content = bytearray(bench.last.read_bytes())
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            bench.last.write_bytes(content)
            fell_back += 1
    assert fell_back > 0
    status, printed = bench.train()
    assert status == 0, printed
    bench.assert_same_end()
    return f"{kills} kills, {fell_back} times the newest file damaged; the end is bit-identical"


@row("signals", "SIGTERM, then SIGUSR1, then SIGINT in the middle of an epoch")
def _(bench: Bench) -> str:
    stops = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        process, before = bench.start(*bench.command()), bench.step
        bench.wait_for_step(before + 1, process)
        process.send_signal(number)
        asked = time.perf_counter()
        status = process.wait(60)
        assert status == 75, bench.printed
        stops.append(f"{time.perf_counter() - asked:.1f} s at step {step_of(bench.last)}")
    status, printed = bench.train()
    assert status == 0, printed
    bench.assert_same_end()
    return f"stopped with status 75 in {', '.join(stops)}; the end is bit-identical"


@row("time-limit", "trainer.max_time is over")
def _(bench: Bench) -> str:
    status, printed = bench.train("trainer.max_time=0.00001")
    assert status == 75, printed
    return printed.strip().splitlines()[-1].split("; saved")[0] + "; status 75"


@row("disk-full", "no checkpoint fits on the disk (a limit on the size of files)")
def _(bench: Bench) -> str:
    script = f'ulimit -f 64; exec "{sys.executable}" "$@"'
    done = subprocess.run(["bash", "-c", script, "-", *bench.command()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the run goes on and tries again" in done.stdout
    assert bench.step == 12
    return "all 12 steps made, a warning per checkpoint, status 2 at the end"


@row("hostile", "a checkpoint that runs a command, with a manifest that fits")
def _(bench: Bench) -> str:
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(bench.folder / "was_run"),)

    path = bench.folder / "hostile.pt"
    torch.save({"format": 2, "model": Payload(), "step": 1}, path)
    data = path.read_bytes()
    path.write_bytes(data + Manifest(len(data), hashlib.sha256(data).hexdigest(), 1).line())
    status = bench.start("evaluate.py", f"checkpoint={path}").wait(120)
    assert status == 2, bench.printed
    assert not (bench.folder / "was_run").exists()
    return bench.printed.splitlines()[0].replace(str(bench.folder), "...")[:160]


@row("environment", "a config that wants a variable of the environment")
def _(bench: Bench) -> str:
    status, printed = bench.train("run_name=${oc.env:PLANTED}", PLANTED="a-secret-value")
    assert status == 2, printed
    assert "a-secret-value" not in printed
    assert not bench.run.exists()
    return printed.splitlines()[0]


@row("non-finite", "a learning rate that makes every weight explode")
def _(bench: Bench) -> str:
    status, printed = bench.train("optimizer.lr=1e30", "schedule.warmup_epochs=0", "trainer.on_nonfinite=stop")
    assert status == 2, printed
    assert list((bench.run / "nonfinite").iterdir())
    message = next(line for line in printed.splitlines() if line.startswith("error: "))
    return message.split("; batch in")[0] + "; batch saved"


@row("two-runs", "the same command twice at once")
def _(bench: Bench) -> str:
    first = bench.start(*bench.command("schedule.epochs=200"))
    bench.wait_for_step(1, first)
    second = Bench(bench.folder, bench.images, None)
    process = second.start(*second.command("schedule.epochs=200"))
    status = process.wait(120)
    first.kill()
    first.wait()
    assert status == 2, second.printed
    assert "is in use by process" in second.printed
    return "the second waits 30 s, then ends with status 2 and names the first"


@row("world-size", "two processes stop inside an epoch, one goes on")
def _(bench: Bench) -> str:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    status = bench.start(*torchrun, *bench.command("trainer.max_steps=7")).wait(300)
    assert status == 0, bench.printed
    status, printed = bench.train()
    assert status == 0, printed
    assert "no image of the epoch is lost or repeated" in printed
    losses = [
        [line["train/loss"] for line in read_metrics(folder / "run" / "metrics.jsonl") if "train/loss" in line]
        for folder in (bench.folder, bench.straight)
    ]
    difference = max(abs(one - other) for one, other in zip(*losses, strict=True))
    assert difference < 1e-3
    return f"12 losses as of one process, largest difference {difference:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ids", nargs="*", metavar="ID", help=f"of {', '.join(ROWS)}; all without")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if unknown := set(arguments.ids) - ROWS.keys():
        parser.error(f"no row is named {', '.join(sorted(unknown))}")
    workspace = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        results = run_rows(arguments.ids or list(ROWS), workspace)
    finally:
        shutil.rmtree(workspace)
    table = Table("id", "fault", "what happened", "verdict")
    for result in results:
        table.add_row(result["id"], result["fault"], result["happened"], result["verdict"])
    Console().print(table)
    if arguments.output is not None:
        print_report({"environment": environment(), "rows": results}, arguments.output)
    sys.exit(any(result["verdict"] != "passed" for result in results))


def run_rows(ids: list[str], workspace: Path) -> list[dict[str, str]]:
    images = workspace / "images"
    write_images(images)
    straight = Bench(workspace / "straight", images, None)
    status, printed = straight.train()
    assert status == 0, printed
    results = []
    for name in ids:
        fault, function = ROWS[name]
        try:
            happened, verdict = function(Bench(workspace / name, images, straight.folder)), "passed"
        except Exception as error:  # a row that fails must not end the table
            happened, verdict = f"{type(error).__name__}: {error}"[-600:], "FAILED"
        print(f"{name}: {verdict}", flush=True)
        results.append({"id": name, "fault": fault, "happened": happened, "verdict": verdict})
    return results


def write_images(root: Path) -> None:
    """Six classes of coloured noise, 8 training and 3 val images each."""
    rng = np.random.default_rng(0)
    for label in range(6):
        for split, count in (("train", 8), ("val", 3)):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(0, 128, (90, 120, 3)) + 20 * np.array([label, 5 - label, label % 3])
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{i}.JPEG")


if __name__ == "__main__":
    main()
