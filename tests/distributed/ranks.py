"""Real processes in a gloo group: started together, given a time limit, none left behind.

One process imports torch and the test module, then forks the ranks, so that starting four costs about as much as one.
"""

import contextlib
import fcntl
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

_MAIN = """
import os, pickle, signal, sys, threading, time, traceback
import torch, torch.distributed as dist, torch.distributed.fsdp, torch.distributed.tensor

module, function, ranks, folder, dying = sys.argv[1:]
call = getattr(__import__(module, fromlist=["_"]), function)
torch.set_num_threads(1)


def work(rank):
    output = os.open(f"{folder}/log{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if rank == 0:
        store = dist.TCPStore("localhost", 0, int(ranks), True, wait_for_workers=False)
        with open(f"{folder}/port.new", "w") as file:
            file.write(str(store.port))
        os.rename(f"{folder}/port.new", f"{folder}/port")
    else:
        while not os.path.exists(f"{folder}/port"):
            time.sleep(0.01)
        store = dist.TCPStore("localhost", int(open(f"{folder}/port").read()), int(ranks), False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=int(ranks))
    os.environ["GRADLENS_TEST_FOLDER"] = folder
    result = call()
    with open(f"{folder}/{rank}", "wb") as file:
        pickle.dump(result, file)
    if not dying:
        dist.barrier()
        dist.destroy_process_group()


children = {}
for rank in range(int(ranks)):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work(rank)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    children[child] = rank


def orphaned():
    os.read(0, 1)  # until whoever started this closes it, or is killed
    os.killpg(0, signal.SIGKILL)


threading.Thread(target=orphaned, daemon=True).start()
for _ in range(len(children)):  # one that fails ends all: whoever started this kills the group
    child, status = os.wait()
    if status and str(children[child]) not in dying.split(","):
        sys.exit(1)
"""


def launch(function, ranks=2, seconds=120, dying=()):
    """What the function of a test module returns in each rank; an error if one fails or the time is up.

    The ranks that are `dying` may be killed, and have no result.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, function.__module__, function.__name__, str(ranks), folder, _listed(dying)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        end = time.monotonic() + seconds
        try:
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            code = process.poll()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the ranks too
            said = process.communicate()[0].decode(errors="replace")
        texts = [f"rank {rank}: {_end(Path(f'{folder}/log{rank}'))}" for rank in range(ranks)]
        what = "the time is up" if code is None else f"exit code {code}"
        assert code == 0, "\n".join([what, said[-3000:], *texts])
        alive = [rank for rank in range(ranks) if rank not in dying]
        return [pickle.loads(Path(f"{folder}/{rank}").read_bytes()) for rank in alive]


def once(folder, function, ranks=2):
    """The same, run once for all tests that share the folder, in whatever process they run."""
    path = folder / f"{function.__module__}.{function.__name__}.{ranks}"
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            try:
                result = launch(function, ranks)
            except AssertionError as error:
                result = error
            path.write_bytes(pickle.dumps(result))
        result = pickle.loads(path.read_bytes())
    if isinstance(result, AssertionError):
        raise result
    return result


def _listed(numbers):
    return ",".join(map(str, numbers))


def _end(log):
    return log.read_text(errors="replace")[-3000:] if log.exists() else ""
