"""Real processes in a gloo group: started together, given a time limit, none left behind.

    pytest -> a mother, which imports torch once -> for each launch a leader -> the ranks

Each is forked from the one before, so that starting four ranks costs next to nothing. A leader and its ranks are a process
group, which is killed when one of them fails, when the time is up, and when whoever started them is gone.
"""

import atexit
import contextlib
import fcntl
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

_MOTHER = """
import json, os, pickle, signal, sys, threading, time, traceback
import torch, torch.distributed as dist, torch.distributed.fsdp, torch.distributed.tensor

torch.set_num_threads(1)


def work(call, rank, ranks, folder, dying):
    output = os.open(f"{folder}/log{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if rank == 0:
        store = dist.TCPStore("localhost", 0, ranks, True, wait_for_workers=False)
        with open(f"{folder}/port.new", "w") as file:
            file.write(str(store.port))
        os.rename(f"{folder}/port.new", f"{folder}/port")
    else:
        while not os.path.exists(f"{folder}/port"):
            time.sleep(0.01)
        store = dist.TCPStore("localhost", int(open(f"{folder}/port").read()), ranks, False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    os.environ["GRADLENS_TEST_FOLDER"] = folder
    result = call()
    with open(f"{folder}/{rank}", "wb") as file:
        pickle.dump(result, file)
    if not dying:
        dist.barrier()
        dist.destroy_process_group()


def forked(call, *arguments):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = call(*arguments) or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def orphaned():
    os.read(0, 1)  # until whoever started this is gone: nothing more is asked while a leader is at work
    os.killpg(0, signal.SIGKILL)


def lead(call, ranks, folder, dying):
    os.setpgid(0, 0)
    children = {forked(work, call, rank, ranks, folder, dying): rank for rank in range(ranks)}
    threading.Thread(target=orphaned, daemon=True).start()
    for _ in range(ranks):  # one that fails ends all
        child, status = os.wait()
        if status and children[child] not in dying:
            return 1


for line in iter(sys.stdin.buffer.raw.readline, b""):
    module, function, environment, *arguments = json.loads(line)
    os.environ.update(environment)
    call = getattr(__import__(module, fromlist=["_"]), function)
    leader = forked(lead, call, *arguments)
    print(leader, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1]), flush=True)
"""


class Mother:
    """The process that all launches of this one are forked from."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-c", _MOTHER],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def run(self, function, ranks, folder, seconds, dying):
        """The leader's exit code, or None when the time is up; then, or when one failed, all are killed."""
        environment = {name: value for name, value in os.environ.items() if name.startswith("GRADLENS_TEST")}
        request = [function.__module__, function.__name__, environment, ranks, folder, list(dying)]
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        end, leader = time.monotonic() + seconds, None
        try:
            leader = self._number(end)
            return None if leader is None else self._number(end)
        finally:
            if leader is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(leader, signal.SIGKILL)

    def close(self):
        """Nothing is asked any more."""
        self._process.kill()
        self._process.communicate()

    def _number(self, end):
        """What it says next, None if nothing."""
        ready = select.select([self._process.stdout], [], [], max(end - time.monotonic(), 0))[0]
        line = self._process.stdout.readline() if ready else b""
        return int(line) if line else None


_mothers = []
atexit.register(lambda: [mother.close() for mother in _mothers])


def launch(function, ranks=2, seconds=120, dying=()):
    """What the function of a test module returned in each rank; an error if one fails or the time is up.

    The ranks that are `dying` may be killed, and have no result.
    """
    if not _mothers:
        _mothers.append(Mother())
    with tempfile.TemporaryDirectory() as folder:
        code = _mothers[-1].run(function, ranks, folder, seconds, dying)
        if code is None:
            _mothers.pop().close()
        texts = [f"rank {rank}: {_end(Path(f'{folder}/log{rank}'))}" for rank in range(ranks)]
        assert code == 0, "\n".join(["the time is up" if code is None else f"exit code {code}", *texts])
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


def _end(log):
    return log.read_text(errors="replace")[-3000:] if log.exists() else ""
