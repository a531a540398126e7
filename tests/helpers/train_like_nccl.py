"""train.py on gloo, where a process whose peer has gone waits without end, as it does under NCCL."""

import os
import runpy
import time
from pathlib import Path

from contextual_cnn import distributed
from contextual_cnn.engine import trainer

distributed._is_about_a_peer = lambda error: time.sleep(10_000)
if "TEST_BROKEN_EVALUATION" in os.environ:
    trainer.evaluate = lambda *_: 1 / 0
runpy.run_path(str(Path(__file__).parents[2] / "train.py"), run_name="__main__")
