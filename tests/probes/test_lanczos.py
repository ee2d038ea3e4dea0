"""Both ends of a spectrum, against matrices whose eigenvalues are known."""

import numpy as np
import pytest
import torch

from gradlens.probes import lanczos
from gradlens.probes.lanczos import extremes

SPECTRA = {
    "a negative end below a bulk": np.r_[-1.2, np.linspace(0, 1, 298), 5, 50],
    "weight decay under a small top": np.r_[0.1 + np.geomspace(1e-6, 1e-3, 400), 0.1157],
    "all but one alike": np.r_[np.ones(200), -1e-3],
    "over six orders of magnitude": np.r_[-np.geomspace(1e-3, 1, 100), np.geomspace(1e-3, 1e3, 300)],
    "two equal ends": np.r_[-3.0, -3.0, np.zeros(100), 3.0, 3.0],
}


def matrix(spectrum, dtype):
    random = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=random, dtype=torch.float64))
    full = (q * torch.from_numpy(spectrum)) @ q.T
    return ((full + full.T) / 2).to(dtype)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPECTRA)
def test_both_ends_lie_within_their_residuals(name, dtype, kept, monkeypatch):
    """With the vectors kept or not, an eigenvalue is within the residual, and it is the end where it says converged."""
    monkeypatch.setattr(lanczos, "BASIS", lanczos.BASIS if kept else 0)
    full = matrix(SPECTRA[name], dtype)
    spectrum = torch.linalg.eigvalsh(full.double()).numpy()  # what rounding to float32 has made of it
    found = extremes(lambda v: full @ v, torch.empty(len(full), dtype=dtype), torch.Generator().manual_seed(1))
    spread = spectrum.max() - spectrum.min()
    for end, true in ((found.bottom, spectrum.min()), (found.top, spectrum.max())):
        assert np.abs(spectrum - end.value).min() <= end.residual + 1e-6 * spread
        if end.converged:
            assert abs(end.value - true) <= 2 * end.residual + 1e-6 * spread


def test_the_basis_is_made_orthogonal_only_when_it_must_be(monkeypatch):
    """It stays orthogonal to the root of the rounding, as Simon's recurrence promises, and rarely has to be mended."""
    made, bases = [], []
    against_all = lanczos._Basis._against_all
    monkeypatch.setattr(lanczos._Basis, "_against_all", lambda self, w, beta: made.append(0) or against_all(self, w, beta))
    init = lanczos._Basis.__init__
    monkeypatch.setattr(lanczos._Basis, "__init__", lambda self, *a: bases.append(self) or init(self, *a))
    spectrum = SPECTRA["over six orders of magnitude"]
    full = matrix(spectrum, torch.float64)
    found = extremes(lambda v: full @ v, torch.empty(len(spectrum), dtype=torch.float64), torch.Generator(), most=100)
    for basis in bases:
        q = torch.cat(basis._filled())
        assert (q @ q.T - torch.eye(len(q), dtype=q.dtype)).abs().max() < 1e-6
    assert 0 < len(made) < found.iterations / 2
