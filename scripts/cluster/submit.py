"""Submits a training to SLURM through submitit (`pip install -e '.[slurm]'`); it comes back until it is complete.

python scripts/cluster/submit.py --nodes 2 --gpus-per-node 8 --partition gpu \\
    model=contextual_convnext_t data.root=$ROOT run_name=ctx_t

One scripts/launch.sh per node. Before the time is up, or for a job of higher priority, SLURM sends USR1: the run saves
and ends, and the job goes back into the queue, where the same run goes on. With --local the same happens on this
machine without SLURM. scripts/cluster/train.sbatch does all this without submitit, in a file to adapt.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")  # to all processes of a job, which know what to do with it

try:
    import submitit
except ImportError:
    sys.exit("error: submitit is not installed\n  fix: pip install -c constraints.txt -e '.[slurm]'")

ROOT = Path(__file__).resolve().parent.parent.parent
STOPPED = 75
TIMEOUTS = 1000  # submitit's limit of how often a job may come back; ours is the end of the training


class Training:
    """What runs on each node; submitit pickles it, and calls `checkpoint` on the first node when the signal comes."""

    def __init__(self, processes: str, overrides: list[str]) -> None:
        self.processes, self.overrides = processes, overrides
        self._launcher: subprocess.Popen | None = None

    def __call__(self) -> None:
        job = submitit.JobEnvironment()
        port = 20000 + int(re.sub(r"\D", "", job.job_id)) % 10000  # the job's own, in case two share a node
        rendezvous = [
            "--rdzv-backend",
            "c10d",
            "--rdzv-id",
            job.job_id,
            "--rdzv-endpoint",
            f"{job.hostnames[0]}:{port}",
        ]
        nodes = ["--nnodes", str(job.num_nodes), "--nproc-per-node", self.processes]
        self._launcher = subprocess.Popen(
            ["scripts/launch.sh", *nodes, *rendezvous, "train.py", *self.overrides],
            cwd=ROOT,
            env={**os.environ, "PYTHON": os.environ.get("PYTHON", sys.executable)},
        )
        # In a thread: the signal's handler waits too, and Popen.wait must not be entered twice
        self._waiting = threading.Thread(target=self._launcher.wait)
        self._waiting.start()
        try:
            self._waiting.join()
        finally:  # Ctrl-C: nothing that this process started may outlive it
            self._launcher.terminate()
            self._waiting.join()
        status = self._launcher.returncode
        if status == STOPPED and job.global_rank != 0:
            return  # the first node puts the job back into the queue
        if status != 0:
            raise RuntimeError(f"scripts/launch.sh ended with status {status}; the log above says why")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        if self._launcher is not None:  # the signal may have come before it was started
            self._launcher.send_signal(signal.SIGUSR1)
            self._launcher.wait()
        return submitit.helpers.DelayedSubmission(Training(self.processes, self.overrides))


def main() -> None:
    arguments = parse_arguments()
    executor = submitit.AutoExecutor(
        arguments.logs, cluster="local" if arguments.local else "slurm", slurm_max_num_timeout=TIMEOUTS
    )
    executor.update_parameters(
        name="contextual-cnn", nodes=arguments.nodes, tasks_per_node=1, timeout_min=round(60 * arguments.hours)
    )
    if not arguments.local:
        executor.update_parameters(
            gpus_per_node=arguments.gpus_per_node,
            cpus_per_task=arguments.cpus_per_node,
            slurm_signal_delay_s=120,
            # srun has not taken the job's cores over since SLURM 22.05: all processes would share one core
            slurm_srun_args=["--cpus-per-task", str(arguments.cpus_per_node), "--cpu-bind=none"],
            slurm_additional_parameters={"requeue": True, "exclusive": True},
            **{f"slurm_{key}": value for key in ("partition", "account") if (value := getattr(arguments, key))},
        )
    processes = "1" if arguments.local else str(arguments.gpus_per_node)
    job = executor.submit(Training(processes, arguments.overrides))
    print(f"job {job.job_id}; its log: {job.paths.stdout}", flush=True)
    if arguments.local:
        try:
            job.result()
        except submitit.core.utils.UncompletedJobError as error:
            sys.exit(f"error: {error}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], epilog=__doc__.rpartition("\n\n")[2])
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--cpus-per-node", type=int, default=64)
    parser.add_argument("--hours", type=float, default=24, help="of each stay in the cluster, not of the training (24)")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--logs", type=Path, default=Path("outputs/slurm"), metavar="FOLDER", help="all nodes see it")
    parser.add_argument("--local", action="store_true", help="here, in one process, and wait for it")
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="of train.py")
    return parser.parse_args()


if __name__ == "__main__":
    main()
