"""Real processes in a gloo group: started together, given a time limit, none left behind."""

import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

_MAIN = """
import pickle, sys, torch, torch.distributed as dist
module, function, rank, ranks, folder = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(rank), world_size=int(ranks))
result = getattr(__import__(module, fromlist=["_"]), function)()
pickle.dump(result, open(f"{folder}/{rank}", "wb"))
dist.barrier()
dist.destroy_process_group()
"""


def launch(function, ranks=2, seconds=90):
    """What the function of a test module returns in each rank; an error if one fails or the time is up."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        arguments = [[function.__module__, function.__name__, str(rank), str(ranks), folder] for rank in range(ranks)]
        processes, logs = [], []
        try:
            for rank, given in enumerate(arguments):
                logs.append(open(f"{folder}/log{rank}", "w+"))  # noqa: SIM115 - closed below, with the others
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", _MAIN, *given],
                        cwd=ROOT,
                        env=environment,
                        stdout=logs[-1],
                        stderr=subprocess.STDOUT,
                    )
                )
            end = time.monotonic() + seconds
            while any(p.poll() is None for p in processes) and time.monotonic() < end:
                if any(p.poll() for p in processes):
                    break
                time.sleep(0.05)
            codes = [p.poll() for p in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
            texts = []
            for log in logs:
                log.seek(0)
                texts.append(log.read()[-3000:])
                log.close()
        assert codes == [0] * ranks, "\n".join([f"exit codes {codes}", *texts])
        return [pickle.loads(Path(f"{folder}/{rank}").read_bytes()) for rank in range(ranks)]
