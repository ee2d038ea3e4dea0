"""The GPU kernels equal the reference in Triton's interpreter, compile for real GPUs, and on one make nobody wait.

What needs a GPU is skipped without one.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gradlens
from gradlens import fields, kernels
from gradlens.errors import ArgumentError, GradlensWarning
from gradlens.kernels import reference
from gradlens.statistics.evidence import Evidence
from tests.kernels.made import FLOATS, HOSTILE, check_identical

ROOT = Path(__file__).parent.parent.parent
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MOMENTS = [torch.float64, torch.float64, torch.int32, torch.int32]
DECAYED = [torch.float64] * 2 + [torch.float32] * 4 + [torch.int32, torch.int8]
CASES = re.findall(r"^@case\ndef (\w+)", (Path(__file__).parent / "interpreted.py").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def outcomes():
    """What came of each case in the interpreter: its traceback, empty if it passed."""
    surroundings = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.interpreted"]
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_in_the_interpreter(outcomes, name):
    """The programs give the reference's numbers: counts, extremes, histogram, order and samples exactly, sums to 1e-12."""
    assert not outcomes[name], outcomes[name]


# --- machine code -----------------------------------------------------------------------------------------------------


class Driver:
    """A GPU that is not there: Triton asks it what to compile for."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # programs are kept by device

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def assembled(monkeypatch, tmp_path):
    """`assembled(capability, call)`: the programs that the call would launch: name, grid and, if compiled, machine code."""
    from triton import runtime

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(runtime.driver, "_active", None)
    run = runtime.JITFunction.run

    def programs(capability, call, compiles=True):
        launched = []

        def compiled(program, *args, grid, warmup, **kwargs):
            code = run(program, *args, grid=grid, warmup=True, **kwargs) if compiles else None
            launched.append((program.__name__, grid, code))

        runtime.driver.set_active(Driver(capability))
        with monkeypatch.context() as patch:
            patch.setattr(runtime.JITFunction, "run", compiled)
            call()
        return launched

    return programs


def spilled(code, tmp_path):
    """Bytes of local memory a thread, as the disassembler tells."""
    import triton

    path = tmp_path / "program.cubin"
    path.write_bytes(code.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    told = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    return max(int(n) for n in re.findall(r"STACK:(\d+)", told.stdout + told.stderr))


compiles = [
    needs_triton,
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]


@pytest.mark.parametrize("capability", [pytest.param(n, marks=compiles) for n in (80, 90)])
def test_compiles_for_real_gpus_without_spilling(capability, assembled, tmp_path):
    """All that a step launches becomes machine code of an A100 and an H100, which keeps its values in registers."""
    from gradlens.kernels.triton import Triton

    kernel = Triton()
    g, w, p = (torch.zeros(100_000) for _ in range(3))
    grid = torch.zeros(4, 6, 5, 3).to(memory_format=torch.channels_last)
    half = torch.zeros(100, dtype=torch.bfloat16)
    d, n = g.double(), g.to(torch.int32)
    launched = []
    for call in (
        lambda: kernel.summarize([g, g, g], [w, w, w], [p, p, p], [p.clone(), p.clone(), p.clone()]),
        lambda: kernel.summarize([g, g], [w, w], [p, p], None, False),
        lambda: kernel.summarize([half], [half]),
        lambda: kernel.summarize([half.double()], [half.double()], [half.double()], [half.double()]),
        lambda: kernel.summarize([grid], [grid.clone()]),
        lambda: kernel.compare([g], [w], [p], [g]),
        lambda: kernel.compare([None], [half], [half]),
        lambda: kernel.sample([g, grid]),
        lambda: kernel.add_moments([g], [[d, d, n, n]], 2.0, 0.5, 1.0, set()),
        lambda: kernel.add_moments([half], [[d[:100], d[:100], n[:100], n[:100]]], torch.tensor(2.0), 0.5, 1.0, set()),
        lambda: kernel.add_moments([g[:1].expand(7)], [[d[:7], d[:7], n[:7], n[:7]]], 1.0, 0.5, 1.0, set()),
        lambda: kernel.fold_decayed([d], [[d, d, g, g, g, g, n, n.to(torch.int8)]], 0.02, set()),
    ):
        launched += assembled(capability, call)
    names = [name for name, *_ in launched]
    assert names == [*["summarize"] * 5, *["compare"] * 2, "sample", "sample", *["add_moments"] * 3, "fold_decayed"]
    assert launched[0][1] == (3 * 7,)
    for name, _, code in launched:
        assert spilled(code, tmp_path) <= 16, (name, code.metadata)
    ptx = launched[0][2].asm["ptx"]
    assert ptx.count("ld.global.v2.b32") == 3  # whole tiles of the gradient, the weights and the last gradient


@needs_triton
@pytest.mark.slow
def test_launches_do_not_grow_with_the_tensors(assembled):
    """One launch a type and layout, whatever the number of tensors."""
    from gradlens.kernels.triton import Triton

    kernel = Triton()
    gradients = [torch.zeros(n % 7 + 1, dtype=dtype) for n in range(100) for dtype in (torch.float32, torch.bfloat16)]
    grids = [torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)] * 3
    kept = [[torch.zeros(8 * len(g), dtype=torch.int8).view(t)[: len(g)] for t in MOMENTS] for g in gradients]
    decayed = [[torch.zeros(8 * len(g), dtype=torch.int8).view(t)[: len(g)] for t in DECAYED] for g in gradients]
    wide = [g.double() for g in gradients]
    left = set(range(200))
    for call, types, any_layout in (
        (kernel.summarize, 2, True),
        (lambda tensors: kernel.compare(tensors, tensors, tensors), 2, True),
        (kernel.sample, 2, True),
        (lambda tensors: kernel.add_moments(tensors, kept, 1.0, 0.5, 1.0, left), 2, False),
        (lambda tensors: kernel.fold_decayed(wide, decayed, 0.02, left), 1, False),
    ):
        launched = assembled(80, lambda call=call: call(gradients), compiles=False)
        assert types <= len(launched) <= 2 * types  # where torch laid some at odd addresses
        if any_layout:
            assert len(assembled(80, lambda call=call: call(gradients + grids), compiles=False)) == len(launched) + 1


# --- the pick of a backend --------------------------------------------------------------------------------------------


class Broken:
    """A backend that fails."""

    def __init__(self, error):
        self.error, self.asked = error, 0

    def summarize(self, *columns):
        self.asked += 1
        raise self.error


def test_a_backend_that_fails_is_left_at_once():
    """Its first failure is told, with what stands in now; the numbers come from there, and it is not asked again."""
    broken, g = Broken(RuntimeError("no C compiler")), torch.randn(7)
    backend = kernels.Standby(broken, reference)
    with pytest.warns(GradlensWarning, match=r"no C compiler.*stand in"):
        rows = backend.summarize([g], None, None, None)
    assert torch.equal(rows.nan_to_num(7), reference.summarize([g]).nan_to_num(7))
    backend.summarize([g], None, None, None)
    assert broken.asked == 1


def test_arguments_that_are_wrong_are_no_failure():
    """An error of the caller goes to the caller, and the backend stays."""
    broken = Broken(ArgumentError("give as many"))
    backend = kernels.Standby(broken, reference)
    for asked in (1, 2):
        with pytest.raises(ArgumentError):
            backend.summarize([torch.ones(1)], None, None, None)
        assert broken.asked == asked


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def on_gpu(tensors):
    return [None if tensor is None else tensor.cuda() for tensor in tensors]


@needs_gpu
@needs_triton
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_the_reference_on_a_gpu(dtype):
    """Sizes from nothing to many chunks, hostile values, and layouts, against the reference on the CPU."""
    from gradlens.kernels.triton import Triton

    gradients = [torch.randn(n).to(dtype) for n in (0, 1, 255, 256, 257, 16384, 16385, 3_000_001)]
    gradients += [torch.tensor(HOSTILE, dtype=torch.float64).to(dtype), torch.ones(100_000).to(dtype)]
    gradients += [
        torch.randn(64, 32, 3, 3).to(dtype).to(memory_format=torch.channels_last),
        torch.randn(50, 70).to(dtype).t(),
    ]
    weights, previous = ([torch.randn_like(g, dtype=torch.float32).to(dtype) for g in gradients] for _ in range(2))
    lists = gradients, weights, previous
    there = [on_gpu(tensors) for tensors in lists]
    kernel = Triton()
    check_identical(kernel.summarize(*there).cpu(), reference.summarize(*lists), fields.SUMMARY)
    check_identical(kernel.summarize(*there, None, False).cpu(), reference.summarize(*lists, None, False), fields.SUMMARY)
    check_identical(kernel.compare(*there).cpu(), reference.compare(*lists), fields.UPDATES)
    for _ in range(20):  # whichever program comes last
        assert torch.equal(kernel.summarize(*there).view(torch.int64), kernel.summarize(*there).view(torch.int64))
    torch.testing.assert_close(kernel.sample(there[0]).cpu(), reference.sample(gradients), rtol=0, atol=0, equal_nan=True)


@needs_gpu
@needs_triton
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_evidence_on_a_gpu_is_that_of_the_cpu(dtype):
    """Means, squared deviations, signs, and what decays over steps, of sizes from nothing to many chunks."""
    shapes = [(), (0,), (255, 257), (64, 32, 3), (3_000_001,)]
    here, there = (Evidence([torch.empty(shape, device=device) for shape in shapes]) for device in ("cpu", "cuda"))
    for step in range(3):
        for _ in range(1 + step):
            gradients = [torch.randn(shape).to(dtype) for shape in shapes]
            here.update(gradients)
            there.update(on_gpu(gradients))
        here.step_done()
        there.step_done()
    for mine, theirs in zip(there.moments._parts(), here.moments._parts(), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-18)
    for mine, theirs in zip(there._steps, here._steps, strict=True):
        for a, b in zip(mine.kept, theirs.kept, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-7)


@needs_gpu
def test_a_watched_step_waits_for_nothing():
    """No call of a watched step makes the host wait for the device: CUDA would raise."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 8)).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(32, 64, device="cuda")
    with gradlens.watch(model, optimizer, features=("flips", "updates", "evidence")) as lens:
        for step in range(6):
            if step == 2:  # the programs are compiled, the buffers made
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
            finally:
                if step == 5:
                    torch.cuda.set_sync_debug_mode("default")
        lens.flush()
        assert [str(finding) for finding in lens.findings() if finding.rule == "gradlens-fault"] == []
        assert lens.history()["step"].nunique() == 6


@needs_gpu
@needs_triton
def test_a_billion_weights_in_bfloat16(record_property):
    """Counts of 1e9 entries are exact, memory besides them stays under 64 MiB; the time against one read is recorded."""
    from gradlens.kernels.triton import Triton

    if torch.cuda.mem_get_info()[0] < 6e9:
        pytest.skip("needs 6 GB of free GPU memory")
    gradients = [torch.randn(10**8, device="cuda", dtype=torch.bfloat16) for _ in range(10)]
    kernel = Triton()
    kernel.summarize(gradients)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rows = kernel.summarize(gradients)
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20
    numel, positive, negative, zero = (rows[:, fields.AT[name]] for name in ("numel", "positive", "negative", "zero"))
    assert torch.equal(positive + negative + zero, numel)
    assert torch.equal(positive, torch.stack([(g > 0).sum() for g in gradients]).double())

    def seconds(call):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / 5

    read = seconds(lambda: [g.view(torch.int64).sum() for g in gradients])
    record_property("times_of_one_read", seconds(lambda: kernel.summarize(gradients)) / read)
