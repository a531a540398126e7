"""Real runs killed and preempted at random moments, and what must hold after each; the tests do few, the suite many.

Every command is the real train.py; the model is timm's smallest with batch norms, so that a run lasts seconds.
"""

import os
import random
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from contextual_cnn.runs.checkpoint import load_checkpoint
from tests.conftest import small_run
from tests.helpers.endings import assert_same_end, checkpoint, steps_logged
from tests.helpers.facts import tells
from tests.helpers.launched import Launched
from tests.helpers.quick_start import Command, group, run


def smallest_run(images: Path, folder: Path, *overrides: str) -> list[str]:
    """Arguments of train.py: 8 epochs of 3 steps, saved after each step."""
    model = ["model=timm", "model.name=test_efficientnet", "data.randaugment_on=device"]
    length = ["schedule.epochs=8", "checkpoint.every_steps=1"]
    arguments = small_run(images, folder, *model, *length, *overrides)
    return [a for a in arguments if not a.startswith(("model=contextual", "model.layer_scale"))]


@dataclass
class Kills:
    """kills: in all. inside_a_save: of them. damaged: newest checkpoints damaged after a kill. finished: runs that
    came to their end, each compared with the uninterrupted one."""

    kills: int = 0
    inside_a_save: int = 0
    damaged: int = 0
    finished: int = 0

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {self.inside_a_save} of them inside a save, {self.damaged} times the newest "
            "checkpoint damaged: 0 steps lost beyond the newest whole one, 0 left unreadable by a kill; "
            f"{self.finished} of {self.finished} finished runs bit-identical"
        )


def kill_at_random_moments(images: Path, folder: Path, kills: int, *, damage: bool, seed: int = 0) -> Kills:
    """kill -9 of one process after another, from its first moments to its last; at the end the run is completed.

    Args:
        damage: after each kill the newest checkpoint is damaged, if there is another whole one.
    """
    draw, count = random.Random(seed), Kills()
    straight = folder / "straight"
    straight.mkdir(parents=True)
    status, printed = run(*smallest_run(images, straight), output=straight / "output")
    assert status == 0, printed
    started = time.monotonic()
    status, printed = run(*smallest_run(images, folder / "timed"), output=straight / "output")
    assert status == 0, printed
    lifetime = time.monotonic() - started
    while count.kills < kills:
        victim = Victim(images, folder / f"run_{count.finished}", draw, count)
        while count.kills < kills and victim.lives_for(draw.uniform(0.05, 0.6 * lifetime)):
            if damage:
                victim.damage_newest()
        if not victim.is_complete:
            assert not victim.lives_for(None)
        assert_same_end(straight, victim.folder)
        count.finished += 1
    return count


class Victim:
    """One run that is started again and again by the same command."""

    def __init__(self, images: Path, folder: Path, draw: random.Random, count: Kills) -> None:
        folder.mkdir()
        self.folder, self._checkpoints, self._command = folder, folder / "run/checkpoints", smallest_run(images, folder)
        self._draw, self._count = draw, count
        self._newest = 0  # step of the newest whole checkpoint
        self._damaged: dict[str, bytes] = {}
        self.is_complete = False

    def lives_for(self, seconds: float | None) -> bool:
        """Starts the command and kills it after some time, or never; whether it was killed."""
        left_over = self._half_written()
        process = Command(*self._command, output=self.folder / "output")
        if seconds is not None:
            process.process.join(seconds)
            process.process.kill()
        status = process.wait()
        assert status in (0, -signal.SIGKILL), process.printed
        self._check_resumed(process.printed)
        self.is_complete = status == 0
        if self.is_complete:
            return False
        self._count.kills += 1
        self._count.inside_a_save += bool(self._half_written() - left_over)
        newest = max(self._whole_steps().values(), default=0)
        assert newest >= self._newest, f"step {self._newest} was saved, now the newest is {newest}"
        self._newest = newest
        return True

    def damage_newest(self) -> None:
        """If there is another one that is whole. Not best.pt, which nothing could bring back for the comparison."""
        steps = self._whole_steps()
        if len(steps) < 2 or "last.pt" not in steps:
            return
        path = self._checkpoints / "last.pt"
        if path.stat().st_nlink > 1:  # killed between two renames: previous.pt is the same file still
            return
        self._damaged[path.name] = damaged(path.read_bytes(), self._draw)
        path.write_bytes(self._damaged[path.name])
        del steps[path.name]
        self._newest = max(steps.values())
        self._count.damaged += 1

    def _half_written(self) -> set[int]:
        return {path.stat().st_mtime_ns for path in self._checkpoints.glob("*.tmp")}

    def _whole_steps(self) -> dict[str, int]:
        """Steps by file. Only what was damaged here, and not written again since, may be unreadable."""
        paths = [path for path in self._checkpoints.glob("*.pt") if path.read_bytes() != self._damaged.get(path.name)]
        return {path.name: load_checkpoint(path)["step"] for path in paths}

    def _check_resumed(self, printed: str) -> None:
        """From the newest whole checkpoint and from no other; a process killed early has not come so far."""
        resumed = re.search(r"^resuming .* from step (\d+) ", printed, re.MULTILINE)
        if resumed is not None:
            assert int(resumed[1]) == self._newest, printed
        elif "run folder" in printed:
            assert self._newest == 0, printed


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A bit flipped, cut short, emptied, or without the line that vouches for it."""
    kind = draw.choice(("flipped", "cut", "emptied", "without its last line"))
    if kind == "flipped":
        at = draw.randrange(len(content))
        return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    if kind == "cut":
        return content[: draw.randrange(1, len(content))]
    return b"" if kind == "emptied" else content[: content.rindex(b"\ncontextual-cnn checkpoint ")]


def kill_ranks_under_the_launcher(images: Path, folder: Path, kills: int, *, seed: int = 0) -> str:
    """One run of two processes through scripts/launch.sh: one is killed and all are restarted, so many times."""
    draw, length = random.Random(seed), f"schedule.epochs={8 + 2 * kills}"
    straight, killed = folder / "straight", folder / "killed"
    for path in (straight, killed):
        path.mkdir(parents=True)
    _complete_group(*smallest_run(images, straight, length), folder=straight)
    launched = Launched(killed, *smallest_run(images, killed, length), MAX_RESTARTS=str(kills))
    waits, saved = [], 0
    for i in range(kills):
        since = time.monotonic()
        launched.wait_until(lambda n=i, s=saved: launched.printed.count("run folder") > n and launched.step > s)
        waits.append(time.monotonic() - since)
        time.sleep(draw.uniform(0, 0.5))
        os.kill(draw.choice(launched.workers), signal.SIGKILL)
        saved = launched.step
    assert launched.wait() == 0, launched.printed
    resumed = [int(step) for step in re.findall(r"^resuming .* from step (\d+) ", launched.printed, re.MULTILINE)]
    assert len(resumed) == kills
    assert resumed == sorted(resumed)
    assert_same_end(straight, killed)
    return (
        f"{kills} kills of one of two ranks, all restarted by the launcher and back at a new step after "
        f" {sum(waits) / kills:.0f} s on average, imports included; the end is bit-identical"
    )


def preempt_two_ranks(images: Path, folder: Path, times: int, *, seed: int = 0) -> str:
    """SIGTERM to one of two processes at a random moment, again and again; then the run is completed."""
    draw, length = random.Random(seed), f"schedule.epochs={2 * times}"
    straight, stopped = folder / "straight", folder / "stopped"
    for path in (straight, stopped):
        path.mkdir(parents=True)
    _complete_group(*smallest_run(images, straight, length), folder=straight)
    command, slowest, before = smallest_run(images, stopped, length), 0.0, 0
    for _ in range(times):
        ranks = group(2, *command, folder=stopped)
        ranks[0].wait_until(lambda before=before: max(steps_logged(stopped), default=0) > before)
        ranks[0].process.join(draw.uniform(0, 0.3))
        asked = time.monotonic()
        draw.choice(ranks).send(signal.SIGTERM)
        statuses = [rank.wait() for rank in ranks]
        assert statuses == [75, 75], "\n".join(rank.printed for rank in ranks)
        slowest = max(slowest, time.monotonic() - asked)
        step = checkpoint(stopped)["step"]
        assert tells(ranks[0].printed, "stopped", "step", f"{step}")
        assert step == max(steps_logged(stopped)) > before
        before = step
    _complete_group(*command, folder=stopped)
    assert_same_end(straight, stopped)
    return (
        f"{times} of {times} times both ranks ended with status 75 and the step saved that they had reached, the "
        f"slowest in {slowest:.1f} s; the end is bit-identical"
    )


def _complete_group(*command: str, folder: Path) -> None:
    ranks = group(2, *command, folder=folder)
    statuses = [rank.wait(400) for rank in ranks]
    assert statuses == [0, 0], "\n".join(rank.printed for rank in ranks)
