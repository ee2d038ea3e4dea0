"""What a thread has freed goes back to the system."""

import subprocess
import sys
import textwrap

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_threads_have_freed_goes_back():
    """Eight threads each take and free some 30 MB in pieces; afterwards the process is nearly as small as before."""
    program = """
    import threading
    import numpy, pyarrow
    from gradlens.dashboard import memory

    def megabytes():
        return int(open("/proc/self/status").read().partition("VmRSS:")[2].split()[0]) / 1000

    def work(kept):
        pieces = [numpy.ones(10_000) for _ in range(400)]
        kept.append(pieces[-1])  # at the top of the thread's heap: nothing below it goes back by itself

    before, kept = megabytes(), []
    for _ in range(8):
        thread = threading.Thread(target=work, args=(kept,))
        thread.start()
        thread.join()
    held = megabytes() - before
    memory.release()
    print(held, megabytes() - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    held, left = map(float, done.stdout.split())
    assert held > 20
    assert left < 5
