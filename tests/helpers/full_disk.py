"""Logs 100 rows to a metrics file that at first may not grow beyond 1,000 bytes.

python tests/helpers/full_disk.py FOLDER
"""

import logging
import resource
import sys
from pathlib import Path

from contextual_cnn.runs.loggers import JsonLinesLogger

if __name__ == "__main__":
    logging.basicConfig()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    logger = JsonLinesLogger(Path(sys.argv[1]) / "metrics.jsonl", resumed_step=0)
    for step in range(1, 101):
        if step == 80:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        logger.log(step, {"train/loss": 1 / step})
    logger.close()
