"""One thread in every process of the tests: the last bits of a sum depend on their number, and the cores are shared."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, also by the fork server
