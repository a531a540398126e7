"""What every process of the tests needs before anything else."""

import os
import signal

# The last bits of a sum depend on the number of threads, and the cores are shared; also by the fork server
os.environ["OMP_NUM_THREADS"] = "1"
# A shell has it ignored in what it starts in the background, and then no command that a test starts would hear it
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
