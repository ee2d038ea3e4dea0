"""Questions of a live model are answered in chunks: the same answers, in little memory."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import gradlens
from gradlens.watching import live_weights

SIZE = 20_000_000
ALLOWED = 64  #: MiB beyond the training's own, the result of gradient() apart


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(live_weights, "CHUNK", 7)


def watched():
    """Parameters of every layout and type, with gradients that have ties, NaN and infinities."""
    torch.manual_seed(0)
    parameters = {
        "long": torch.randn(90),
        "turned": torch.randn(6, 5).t(),
        "half": torch.randn(4, 9).to(torch.bfloat16),
        "wide": torch.randn(11, dtype=torch.float64),
        "complex": torch.randn(3, 4, dtype=torch.complex64),
        "scalar": torch.randn(()),
        "without": torch.randn(5),
        "empty": torch.randn(0, 3),
    }
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in parameters.items()}
    lens = gradlens.watch(parameters, rules=())
    sum((p.abs() * 0.5).sum().double() for name, p in parameters.items() if name != "without").backward()
    with torch.no_grad():
        for name, p in parameters.items():
            if p.grad is not None and name != "complex":
                p.grad.copy_(torch.randn(p.shape).round(decimals=1))
        parameters["long"].grad[[3, 50, 80]] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    return lens, parameters


@pytest.mark.parametrize("by", live_weights.ORDERS)
@pytest.mark.parametrize("top", [1, 5, 60, 10_000])
def test_the_top_is_the_head_of_the_sorted_whole(by, top):
    """In every order, with ties in model order and NaN last."""
    lens, _ = watched()
    with lens:
        whole = lens.weights()
        order = whole[by].abs().sort_values(ascending=False, kind="stable", na_position="last").index[:top]
        wanted = whole.loc[order].reset_index(drop=True)
        found = lens.weights(top=top, by=by)
    assert found.drop(columns="index").equals(wanted.drop(columns="index"))
    assert found["index"].tolist() == wanted["index"].tolist()


def test_the_gradient_is_all_partials_one_after_another():
    """Zeros where there is none, a complex one as two reals, on the common type."""
    lens, parameters = watched()
    with lens:
        flat, table = lens.gradient(), lens.weights()
    assert flat.dtype == torch.float32
    np.testing.assert_array_equal(flat.double().numpy(), table["partial"].to_numpy())
    assert len(flat) == sum(p.numel() * (2 if p.is_complex() else 1) for p in parameters.values())


def test_explain_ranks_among_all_chunks():
    """How many partials are larger is counted over the whole parameter."""
    lens, parameters = watched()
    with lens:
        text = lens.explain("wide", 4)
    larger = int((parameters["wide"].grad.abs() > parameters["wide"].grad[4].abs()).sum())
    assert f"{larger + 1}" in text


PROGRAM = f"""
import json, torch, gradlens
p = torch.nn.Parameter(torch.randn({SIZE}))
lens = gradlens.watch({{"p": p, "q": torch.nn.Parameter(torch.randn(3))}}, rules=(), features=())
(p * p).sum().backward()
p.grad.copy_(torch.randn({SIZE}))
lens.weights(top=3), lens.report()

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

def more(ask):
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    answer = ask()
    return peak() - before

orders = {{by: more(lambda: lens.weights(top=1000, by=by)) for by in ("sensitivity", "saliency", "value", "partial")}}
print(json.dumps(orders | {{"explain": more(lambda: lens.explain("p", 7)), "report": more(lens.report),
    "gradient": more(lens.gradient) - {SIZE} * 4 / 2**20}}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_questions_take_little_memory():
    """With 20 million weights none takes what half a copy of them would."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    peaks = json.loads(ran.stdout.splitlines()[-1])
    assert len(peaks) == 7
    assert all(more < ALLOWED for more in peaks.values()), peaks
