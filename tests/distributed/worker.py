"""One of several processes: python worker.py FOLDER CHECK..."""

import json
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from checks import CHECKS

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    folder, outcome = Path(sys.argv[1]), {}
    for name in sys.argv[2:]:
        start = time.process_time()
        try:
            CHECKS[name][1](folder)
            outcome[name] = ["", time.process_time() - start]
        except BaseException:
            outcome[name] = [traceback.format_exc(), 0.0]
            break  # the others may stand elsewhere now
    file = folder / f"{dist.get_world_size()}-{dist.get_rank()}.json"
    file.write_text(json.dumps(outcome))
    if not any(error for error, _ in outcome.values()):
        dist.destroy_process_group()
