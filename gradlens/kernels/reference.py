"""The definition of every number that a kernel writes, in plain torch; each faster backend equals this one.

A tensor counts as the list of its real entries in logical order: conjugate and negative bits resolved, a complex entry as
two reals, a sparse tensor with its duplicates added and its untouched entries 0, a distributed one as its local part.
Entries are read as float64 and summed in float64, a piece of at most `PIECE` entries at a time, so that the memory needed
does not grow with the tensor.

    sums, counts   run over the finite entries; numel, nan and inf count the others too
    pairs (w.g)    run over the places where both entries are finite; dw = after - before must be finite as well
    order          of the largest: by falling |g|, equal ones by rising index

Works on any device and never waits for one, but for a sparse gradient that is not coalesced yet: torch waits there.
Not promised: speed, and float64 gradients whose squares overflow (their sums do, as torch's would).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradlens import fields
from gradlens.errors import ArgumentError

PIECE = 2**17  #: entries looked at in one go: 1 MiB of float64, about ten times that with all intermediate results
SAMPLES = 16  #: entries that `sample` takes of each tensor

Numbers = dict[str, Tensor]  #: float64 scalars by field name; an extreme over nothing is +-inf until `_closed`
Group = Sequence[Any]  #: tensors of one shape, or None

_HISTOGRAM = "histogram"
_MERGE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"sum": torch.add, "min": torch.minimum, "max": torch.maximum}
_GRADIENT = [field.name for field in fields.COUNTS + fields.MOMENTS] + [_HISTOGRAM]
_WEIGHTS = [field.name for field in fields.WEIGHTS]
_FLIPS = [field.name for field in fields.FLIPS]
_MOTION = ["update_numel", "update_square_sum", "update_before_square_sum"]
_USED = ["update_used_square_sum", "update_dot", "update_moving", "update_against", "update_stuck"]


def summarize(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor | None] | None = None,
    previous: Sequence[Tensor | None] | None = None,
    keep: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """One row a gradient, `[n, fields.WIDTH]`, float64, on their device. See `gradlens.kernels.summarize`."""
    n = len(gradients)
    columns = [holes(name, given, n) for name, given in (("weights", weights), ("previous", previous), ("keep", keep))]
    with _quiet():
        rows = [_summary(*group) for group in zip(gradients, *columns, strict=True)]
        return torch.stack(rows) if rows else torch.empty(0, fields.WIDTH, dtype=torch.float64, device="cpu")


def compare(
    used: Sequence[Tensor | None],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    loss: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """One row an update, `[n, len(fields.UPDATES)]`, float64, on their device. See `gradlens.kernels.compare`."""
    n = len(before)
    columns = [holes("used", used, n), before, whole("after", after, n), holes("loss", loss, n)]
    with _quiet():
        rows = [_update(*group) for group in zip(*columns, strict=True)]
        return torch.stack(rows) if rows else torch.empty(0, len(fields.UPDATES), dtype=torch.float64, device="cpu")


def sample(tensors: Sequence[Tensor]) -> Tensor:
    """Some entries of each tensor, `[n, SAMPLES]`, float64, on their device. See `gradlens.kernels.sample`."""
    with _quiet():
        rows = [_sample(_plain(tensor)) for tensor in tensors]
        return torch.stack(rows) if rows else torch.empty(0, SAMPLES, dtype=torch.float64, device="cpu")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No graph, results that are ordinary tensors, and no detour through the user's tensor classes."""
    with torch.no_grad(), torch.inference_mode(False), torch._C.DisableTorchFunctionSubclass():
        yield


def holes(name: str, given: Sequence[Tensor | None] | None, n: int) -> Sequence[Tensor | None]:
    return [None] * n if given is None else whole(name, given, n)


def whole(name: str, given: Sequence[Any], n: int) -> Sequence[Any]:
    if len(given) != n:
        raise ArgumentError(f"{name} has {len(given)} entries for {n} tensors; give one each, None where there is none")
    return given


# --- any tensor as pieces of real entries ---------------------------------------------------------------------------


def _plain(tensor: Tensor) -> Tensor:
    """Without its graph, and of a distributed tensor the local part."""
    local = getattr(tensor, "to_local", None)
    return (tensor if local is None else local()).detach()


def _is_sparse(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.layout != torch.strided


def _like(name: str, tensor: Tensor | None, model: Tensor) -> Tensor | None:
    """The tensor in the shape of the model, dense."""
    if tensor is None:
        return None
    tensor = _plain(tensor)
    if tensor.numel() != model.numel() or tensor.is_complex() != model.is_complex():
        given, expected = (f"{tuple(t.shape)} of {t.dtype}" for t in (tensor, model))
        raise ArgumentError(f"{name} has shape {given}, but the tensor it belongs to has {expected}; give as many entries")
    dense = tensor.to_dense() if _is_sparse(tensor) else tensor
    return dense if dense.shape == model.shape else dense.reshape(model.shape)


def _pieces(group: Group, limit: int = PIECE) -> Iterator[Group]:
    """Tensors of one shape, cut alike in logical order into pieces of at most `limit` entries. Nothing is copied."""
    first = next(tensor for tensor in group if tensor is not None)
    if first.numel() <= limit:
        if first.numel():
            yield group
        return
    if first.ndim > 1 and all(tensor is None or tensor.is_contiguous() for tensor in group):
        yield from _pieces([None if tensor is None else tensor.view(-1) for tensor in group], limit)
        return
    length = len(first)
    rows = limit // (first.numel() // length)
    for start in range(0, length, max(rows, 1)):
        if rows:
            yield [None if t is None else t.narrow(0, start, min(rows, length - start)) for t in group]
        else:
            yield from _pieces([None if t is None else t[start] for t in group], limit)


def _entries(piece: Tensor) -> Tensor:
    """Real entries of a piece, flat, float64."""
    piece = piece.resolve_conj()
    if piece.is_complex():
        piece = torch.view_as_real(piece)
    return piece.resolve_neg().reshape(-1).to(torch.float64)


def _read(group: Group) -> list[Any]:
    return [None if piece is None else _entries(piece) for piece in group]


def _reals(tensor: Tensor) -> int:
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def _write(room: Tensor, piece: Tensor) -> None:
    """Overwrite, whatever mode the room was made in."""
    with torch.inference_mode(room.is_inference()):
        room.copy_(piece)


# --- numbers and how they merge -------------------------------------------------------------------------------------


def _sum(terms: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, terms, 0.0).sum()


def _count(where: Tensor) -> Tensor:
    return where.sum().to(torch.float64)


def _least(terms: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, terms, torch.inf).amin()


def _largest(terms: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, terms, -torch.inf).amax()


def _gradient_numbers(g: Tensor) -> Numbers:
    g = g + 0.0  # -0.0 is 0.0 in every number
    finite, magnitude = torch.isfinite(g), g.abs()
    return {
        "numel": torch.full_like(g[0], g.numel()),
        "positive": _count(finite & (g > 0)),
        "negative": _count(finite & (g < 0)),
        "zero": _count(g == 0),
        "nan": _count(torch.isnan(g)),
        "inf": _count(torch.isinf(g)),
        "sum": _sum(g, finite),
        "abs_sum": _sum(magnitude, finite),
        "square_sum": _sum(g * g, finite),
        "min": _least(g, finite),
        "max": _largest(g, finite),
        "abs_max": _largest(magnitude, finite),
        "abs_min_nonzero": _least(magnitude, finite & (g != 0)),
        _HISTOGRAM: _histogram(g, finite & (g != 0)),
    }


def _histogram(g: Tensor, where: Tensor) -> Tensor:
    """Counts by exponent, negative ones first. The exponent is read off the bits of a float64, so it is exact."""
    exponent = ((g.view(torch.int64) >> 52) & 0x7FF) - 1023
    bucket = exponent.clamp(fields.EXPONENT_MIN, fields.EXPONENT_MAX) - fields.EXPONENT_MIN
    bucket = torch.where(where, bucket + fields.BUCKETS * (g > 0), 2 * fields.BUCKETS)  # the last one is thrown away
    counts = torch.zeros(2 * fields.BUCKETS + 1, dtype=torch.int64, device=g.device)
    return counts.scatter_add_(0, bucket, torch.ones_like(bucket))[:-1].to(torch.float64)


def _weight_numbers(w: Tensor) -> Numbers:
    finite = torch.isfinite(w)
    return {"weight_square_sum": _sum(w * w, finite), "weight_abs_max": _largest(w.abs(), finite)}


def _dot_numbers(g: Tensor, w: Tensor) -> Numbers:
    return {"dot": _sum(g * w, torch.isfinite(g) & torch.isfinite(w))}


def _flip_numbers(g: Tensor, p: Tensor) -> Numbers:
    compared = torch.isfinite(g) & torch.isfinite(p)
    moving = compared & (g != 0) & (p != 0)
    return {
        "flip_compared": _count(compared),
        "flip_moving": _count(moving),
        "flip_count": _count(moving & ((g < 0) != (p < 0))),
        "flip_dot": _sum(g * p, compared),
        "flip_square_sum": _sum(g * g, compared),
        "flip_previous_square_sum": _sum(p * p, compared),
    }


def _identity(names: Sequence[str], device: torch.device) -> Numbers:
    """The numbers of nothing at all."""
    start = {"sum": 0.0, "min": torch.inf, "max": -torch.inf}
    numbers = {}
    for name in names:
        size, merge = ((2 * fields.BUCKETS,), "sum") if name == _HISTOGRAM else ((), fields.BY_NAME[name].merge)
        numbers[name] = torch.full(size, start[merge], dtype=torch.float64, device=device)
    return numbers


def _merge(numbers: Numbers, more: Numbers) -> None:
    for name, value in more.items():
        merge = "sum" if name == _HISTOGRAM else fields.BY_NAME[name].merge
        numbers[name] = _MERGE[merge](numbers[name], value)


def _closed(numbers: Numbers, columns: Sequence[fields.Field]) -> Tensor:
    """A row of the columns. A count nobody took is 0, a value nobody took and an extreme over nothing are NaN."""
    device = next(iter(numbers.values())).device
    row = []
    for field in columns:
        value = numbers.get(field.name)
        if value is None:
            value = torch.full((), 0.0 if field.dtype == "int64" else torch.nan, dtype=torch.float64, device=device)
        elif field.merge != "sum":
            value = torch.where(torch.isfinite(value), value, torch.nan)
        row.append(value)
    return torch.stack(row)


# --- the largest -----------------------------------------------------------------------------------------------------

# Candidates are a matrix [4, m]: |g|, g, index, w. Room that is not filled has |g| = -1 and index -1.


def _no_candidates(device: torch.device) -> Tensor:
    nothing = torch.full((4, fields.TOP), torch.nan, dtype=torch.float64, device=device)
    nothing[::2] = -1.0
    return nothing


def _candidates(g: Tensor, w: Tensor | None, start: int) -> Tensor:
    """The largest of a piece whose first entry has index `start`: at most `TOP`, and of equal ones the first."""
    count = min(fields.TOP, g.numel())
    magnitude = torch.where(torch.isfinite(g), g.abs(), -1.0)
    last = torch.topk(magnitude, count).values[-1]
    at = torch.arange(g.numel(), device=g.device, dtype=torch.int64)
    rank = torch.where(magnitude > last, -1, torch.where(magnitude == last, at, g.numel()))
    at = torch.topk(rank, count, largest=False).indices
    value = torch.full_like(magnitude[at], torch.nan) if w is None else w[at]
    return _candidate_matrix(g[at], at + start, value)


def _candidate_matrix(g: Tensor, index: Tensor, w: Tensor) -> Tensor:
    finite = torch.isfinite(g)
    matrix = torch.stack([g.abs(), g + 0.0, index.to(torch.float64), w])
    return torch.where(finite, matrix, torch.where(torch.arange(4, device=g.device)[:, None] % 2 == 0, -1.0, torch.nan))


def _best(candidates: Tensor) -> Tensor:
    """The first `TOP` of at least so many candidates."""
    candidates = candidates[:, torch.argsort(candidates[2], stable=True)]
    return candidates[:, torch.argsort(candidates[0], stable=True, descending=True)[: fields.TOP]]


# --- rows of summarize ------------------------------------------------------------------------------------------------


def _summary(g: Tensor, w: Tensor | None, previous: Tensor | None, keep: Tensor | None) -> Tensor:
    g = _plain(g)
    if _is_sparse(g) and (previous is not None or keep is not None or g.numel() == 0):
        g = g.to_dense()
    w, p, room = _like("a weight", w, g), _like("a previous gradient", previous, g), _room(keep, g)
    numbers, top = _sparse_numbers(g, w) if _is_sparse(g) else _dense_numbers(g, w, p, room)
    return torch.cat([_closed(numbers, fields.SUMMARY), numbers[_HISTOGRAM], top[1], top[2], top[3]])


def _room(keep: Tensor | None, g: Tensor) -> Tensor | None:
    if keep is None or keep.shape == g.shape:
        return keep
    if keep.numel() != g.numel() or not keep.is_contiguous():
        raise ArgumentError(
            f"keep has shape {tuple(keep.shape)} for a gradient of {tuple(g.shape)}; give room for each entry"
        )
    return keep.view(g.shape)


def _dense_numbers(g: Tensor, w: Tensor | None, p: Tensor | None, room: Tensor | None) -> tuple[Numbers, Tensor]:
    names = _GRADIENT + (_WEIGHTS if w is not None else []) + (_FLIPS if p is not None else [])
    numbers, top, start = _identity(names, g.device), _no_candidates(g.device), 0
    for g_piece, w_piece, p_piece, target in _pieces([g, w, p, room]):
        x, y, z = _read([g_piece, w_piece, p_piece])
        _merge(numbers, _gradient_numbers(x))
        if y is not None:
            _merge(numbers, _weight_numbers(y) | _dot_numbers(x, y))
        if z is not None:
            _merge(numbers, _flip_numbers(x, z))
        top = _best(torch.cat([top, _candidates(x, y, start)], dim=1))
        start += x.numel()
        if target is not None:
            _write(target, g_piece)
    return numbers, top


def _sparse_numbers(g: Tensor, w: Tensor | None) -> tuple[Numbers, Tensor]:
    """Those of the entries it has, then those of the zeros between them. The weights count in full."""
    touched = _Touched(g)
    numbers, top = _dense_numbers(touched.values, None if w is None else touched.of(w), None, None)
    top[2] = torch.where(top[2] < 0, -1.0, touched.index(top[2].to(torch.int64)).to(torch.float64))
    untouched = _reals(g) - _reals(touched.values)
    if untouched:
        zero = torch.zeros((), dtype=torch.float64, device=g.device)
        count = torch.full_like(zero, untouched)
        _merge(numbers, {"numel": count, "zero": count, "min": zero, "max": zero, "abs_max": zero})
        index = touched.first_untouched(min(fields.TOP, untouched))
        values = torch.full_like(index, torch.nan, dtype=torch.float64) if w is None else _at(w, index)
        top = _best(torch.cat([top, _candidate_matrix(torch.zeros_like(values), index, values)], dim=1))
    if w is not None:
        numbers |= _identity(["weight_square_sum", "weight_abs_max"], g.device)
        for (piece,) in _pieces([w]):
            _merge(numbers, _weight_numbers(_entries(piece)))
    return numbers, top


class _Touched:
    """The entries that a sparse tensor has: `values` has a row for each place of the sparse axes, by rising place."""

    def __init__(self, tensor: Tensor) -> None:
        tensor = (tensor if tensor.layout == torch.sparse_coo else tensor.to_sparse()).coalesce()
        self.axes, self.values = tensor.indices(), tensor.values()
        self.places = torch.zeros_like(self.axes[0])
        for axis, length in zip(self.axes, tensor.shape[: tensor.sparse_dim()], strict=True):
            self.places = self.places * length + axis
        self._width = math.prod(self.values.shape[1:]) * (2 if tensor.is_complex() else 1)

    def of(self, tensor: Tensor) -> Tensor:
        """What a dense tensor has at the same entries, in the shape of `values`."""
        return tensor[tuple(self.axes)]

    def index(self, at: Tensor) -> Tensor:
        """The index in the whole tensor of entries given by their index in `values`."""
        if not len(self.places):
            return at
        row = torch.div(at, self._width, rounding_mode="floor")
        return self.places[row] * self._width + at - row * self._width

    def first_untouched(self, count: int) -> Tensor:
        """The indices of the first `count` entries that the sparse tensor does not have."""
        at = torch.arange(count, dtype=torch.int64, device=self.places.device)
        rank = torch.div(at, self._width, rounding_mode="floor")
        # Before the k-th touched place lie places[k] - k untouched ones.
        before = self.places - torch.arange(len(self.places), device=self.places.device)
        place = rank + torch.searchsorted(before, rank, right=True)
        return place * self._width + at - rank * self._width

    def at(self, index: Tensor) -> Tensor:
        """The entries at indices of the whole tensor, float64; 0 where there is none."""
        place = torch.div(index, self._width, rounding_mode="floor")
        row = torch.searchsorted(self.places, place).clamp(max=len(self.places) - 1)
        value = _at(self.values, row * self._width + index - place * self._width)
        return torch.where(self.places[row] == place, value, 0.0)


def _at(tensor: Tensor, index: Tensor) -> Tensor:
    """Real entries of a strided tensor by their index in logical order, float64."""
    parts = 2 if tensor.is_complex() else 1
    place, part = torch.div(index, parts, rounding_mode="floor"), index % parts
    axes = []
    for length in reversed(tensor.shape):
        axes.append(place % length)
        place = torch.div(place, length, rounding_mode="floor")
    entries = tensor[tuple(reversed(axes))] if axes else tensor.expand(len(index))
    return _entries(entries).view(-1, parts).gather(1, part[:, None])[:, 0]


# --- rows of compare and sample ---------------------------------------------------------------------------------------


def _update(used: Tensor | None, before: Tensor, after: Tensor, loss: Tensor | None) -> Tensor:
    before = _plain(before)
    if _is_sparse(before):
        before = before.to_dense()
    moved = _like("after", after, before)
    assert moved is not None
    group = [_along(name, tensor, before) for name, tensor in (("used", used), ("loss", loss))]
    dense = [None if tensor is None or _is_sparse(tensor) else tensor for tensor in group]
    numbers = _moved(dense[0], before, moved, dense[1])
    for name, tensor in zip(("used", "loss"), group, strict=True):
        if tensor is not None and _is_sparse(tensor):
            touched = _Touched(tensor)
            there = (touched.of(before), touched.of(moved))
            more = _moved(touched.values, *there, None) if name == "used" else _moved(None, *there, touched.values)
            numbers |= {key: value for key, value in more.items() if key not in _MOTION}
    if loss is not None:
        numbers["update_loss_exact"] = torch.ones((), dtype=torch.float64, device=before.device)
    return _closed(numbers, fields.UPDATES)


def _along(name: str, tensor: Tensor | None, before: Tensor) -> Tensor | None:
    if tensor is not None and _is_sparse(tensor) and tensor.shape == before.shape and before.numel():
        return tensor.detach()
    return _like(name, tensor, before)


def _moved(used: Tensor | None, before: Tensor, after: Tensor, loss: Tensor | None) -> Numbers:
    names = _MOTION + (_USED if used is not None else []) + (["update_loss_dot"] if loss is not None else [])
    numbers = _identity(names, before.device)
    for piece in _pieces([before, after, used, loss]):
        w, new, g, exact = _read(piece)
        dw = new - w
        finite = torch.isfinite(dw)
        _merge(numbers, _motion_numbers(w, dw, finite))
        if g is not None:
            _merge(numbers, _used_numbers(g, dw, finite & torch.isfinite(g)))
        if exact is not None:
            _merge(numbers, {"update_loss_dot": _sum(exact * dw, finite & torch.isfinite(exact))})
    return numbers


def _motion_numbers(w: Tensor, dw: Tensor, finite: Tensor) -> Numbers:
    return {
        "update_numel": torch.full_like(w[0], w.numel()),
        "update_square_sum": _sum(dw * dw, finite),
        "update_before_square_sum": _sum(w * w, finite),
    }


def _used_numbers(g: Tensor, dw: Tensor, finite: Tensor) -> Numbers:
    moving = finite & (g != 0) & (dw != 0)
    return {
        "update_used_square_sum": _sum(g * g, finite),
        "update_dot": _sum(g * dw, finite),
        "update_moving": _count(moving),
        "update_against": _count(moving & ((g > 0) == (dw > 0))),
        "update_stuck": _count(finite & (g != 0) & (dw == 0)),
    }


def _sample(tensor: Tensor) -> Tensor:
    n = _reals(tensor)
    row = torch.zeros(SAMPLES, dtype=torch.float64, device=tensor.device)
    if n == 0:
        return row
    at = torch.arange(min(n, SAMPLES), dtype=torch.int64, device=tensor.device)
    if n > SAMPLES:
        at = torch.div(at * (n - 1), SAMPLES - 1, rounding_mode="floor")
    if _is_sparse(tensor):
        touched = _Touched(tensor)
        row[: len(at)] = touched.at(at) if len(touched.places) else 0.0
    else:
        row[: len(at)] = _at(tensor, at)
    return row
