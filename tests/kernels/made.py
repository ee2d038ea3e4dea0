"""Tensors of every kind, and what their numbers must be, computed one entry at a time in plain Python."""

import math

import numpy as np
import torch
from hypothesis import strategies as st

from gradlens import fields

HOSTILE = [
    0.0,
    -0.0,
    math.nan,
    math.inf,
    -math.inf,
    5e-324,
    -1e-310,
    1e-45,
    -1e-40,
    1e-30,
    -1e20,
    1e20,
    6e-8,
    2.0**-96,
    2.0**32,
    1.0,
    -1.0,
]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
COMPLEX = [torch.complex64, torch.complex128]

values = st.one_of(st.sampled_from(HOSTILE), st.floats(-4, 4, width=32), st.integers(-3, 3).map(float), st.floats(width=32))


def reals(tensor):
    """The real entries in logical order, as a list of Python floats."""
    tensor = tensor.detach()
    tensor = (tensor.to_dense() if tensor.layout != torch.strided else tensor).resolve_conj()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.resolve_neg().to(torch.float64).reshape(-1).tolist()


def total(terms):
    """The sum, rounded once; plain where it overflows."""
    terms = list(terms)
    try:
        return math.fsum(terms)
    except (OverflowError, ValueError):
        return sum(terms)


def extreme(pick, terms):
    return pick(terms, default=math.nan)


def bucket(x):
    exponent = math.frexp(x)[1] - 1
    return min(max(exponent, fields.EXPONENT_MIN), fields.EXPONENT_MAX) - fields.EXPONENT_MIN + fields.BUCKETS * (x > 0)


def expected_scalars(g, w=None, p=None):
    """The columns of `fields.SUMMARY` by name."""
    fine = [x for x in g if math.isfinite(x)]
    row = {
        "numel": len(g),
        "positive": sum(x > 0 for x in fine),
        "negative": sum(x < 0 for x in fine),
        "zero": sum(x == 0 for x in fine),
        "nan": sum(map(math.isnan, g)),
        "inf": sum(map(math.isinf, g)),
        "sum": total(fine),
        "abs_sum": total(map(abs, fine)),
        "square_sum": total(x * x for x in fine),
        "min": extreme(min, fine),
        "max": extreme(max, fine),
        "abs_max": extreme(max, [abs(x) for x in fine]),
        "abs_min_nonzero": extreme(min, [abs(x) for x in fine if x != 0]),
    }
    row |= {f.name: 0 if f.dtype == "int64" else math.nan for f in fields.WEIGHTS + fields.FLIPS}
    if w is not None:
        finite = [x for x in w if math.isfinite(x)]
        row["weight_square_sum"] = total(x * x for x in finite)
        row["weight_abs_max"] = extreme(max, [abs(x) for x in finite])
        row["weight_nonfinite"] = len(w) - len(finite)
        row["dot"] = total(x * y for x, y in zip(g, w, strict=True) if math.isfinite(x) and math.isfinite(y))
    if p is not None:
        pairs = [(x, y) for x, y in zip(g, p, strict=True) if math.isfinite(x) and math.isfinite(y)]
        row["flip_compared"] = len(pairs)
        row["flip_moving"] = sum(x != 0 and y != 0 for x, y in pairs)
        row["flip_count"] = sum((x < 0 < y) or (y < 0 < x) for x, y in pairs)
        row["flip_dot"] = total(x * y for x, y in pairs)
        row["flip_square_sum"] = total(x * x for x, _ in pairs)
        row["flip_previous_square_sum"] = total(y * y for _, y in pairs)
    return row


def expected_histogram(g):
    counts = [0] * (2 * fields.BUCKETS)
    for x in g:
        if math.isfinite(x) and x != 0:
            counts[bucket(x)] += 1
    return counts


def expected_quantiles(g):
    """As the host makes them of the histogram."""
    columns = {name: np.array([value]) for name, value in expected_scalars(g).items()}
    quantiles = fields.quantiles(np.array([expected_histogram(g)]), columns)
    return [values[0] for values in quantiles.values()]


def expected_top(g, w=None):
    """Partials, indices and weights of the largest."""
    order = sorted((i for i, x in enumerate(g) if math.isfinite(x)), key=lambda i: (-abs(g[i]), i))[: fields.TOP]
    padding = fields.TOP - len(order)
    partials = [g[i] for i in order] + [math.nan] * padding
    weights = ([w[i] for i in order] if w is not None else [math.nan] * len(order)) + [math.nan] * padding
    return partials, [float(i) for i in order] + [-1.0] * padding, weights


def same(a, b, scale=0.0):
    """Equal numbers, NaN equal to NaN, sums equal up to 1e-12 of what they add up."""
    if math.isnan(a) or math.isnan(b) or math.isinf(a) or math.isinf(b):
        return (math.isnan(a) and math.isnan(b)) or a == b
    return abs(a - b) <= 1e-12 * scale


def scales(row):
    """Of each sum, the size of its terms."""
    root = {name: math.sqrt(max(row[name], 0.0)) if row[name] == row[name] else 0.0 for name in row}
    return {
        "sum": row["abs_sum"],
        "abs_sum": row["abs_sum"],
        "square_sum": row["square_sum"],
        "weight_square_sum": row["weight_square_sum"],
        "dot": root["square_sum"] * root["weight_square_sum"],
        "flip_dot": root["flip_square_sum"] * root["flip_previous_square_sum"],
        "flip_square_sum": row["flip_square_sum"],
        "flip_previous_square_sum": row["flip_previous_square_sum"],
    }


def check_row(row, g, w=None, p=None):
    """A row of `summarize` is right about these lists of reals."""
    row = row.tolist()
    expected = expected_scalars(g, w, p)
    scale = scales(expected)
    for name, at in fields.AT.items():
        assert same(row[at], expected[name], scale.get(name, 0.0)), (name, row[at], expected[name])
    assert row[fields.HISTOGRAM] == expected_histogram(g)
    assert all(map(same, row[fields.QUANTILE], expected_quantiles(g))), (row[fields.QUANTILE], expected_quantiles(g))
    for columns, numbers in zip((fields.TOP_PARTIAL, fields.TOP_INDEX, fields.TOP_VALUE), expected_top(g, w), strict=True):
        assert all(map(same, row[columns], numbers)), (row[columns], numbers)


def check_identical(rows, reference, columns):
    """Two backends agree: everything exactly but the sums."""
    assert rows.shape == reference.shape
    assert rows.dtype == torch.float64
    for row, honest in zip(rows.tolist(), reference.tolist(), strict=True):
        named = {field.name: value for field, value in zip(columns, honest, strict=False)}
        scale = scales(named) if columns == fields.SUMMARY else update_scales(named)
        for field, a, b in zip(columns, row, honest, strict=False):
            assert same(a, b, scale.get(field.name, 0.0)), (field.name, a, b)
        assert all(map(same, row[len(columns) :], honest[len(columns) :]))


def check_loss_dots(rows, reference, before, after, loss):
    """Two backends agree on `update_loss_dot`, up to 1e-12 of the terms that it adds up."""
    at = [field.name for field in fields.UPDATES].index("update_loss_dot")
    for row, honest, *group in zip(rows, reference, before, after, loss, strict=True):
        scale = 0.0
        if group[2] is not None:
            w, new, g = (reals(tensor) for tensor in group)
            terms = [abs(x * (b - a)) for x, a, b in zip(g, w, new, strict=True)]
            scale = total(term for term in terms if math.isfinite(term))
        assert same(row[at].item(), honest[at].item(), scale), (row[at], honest[at], scale)


def update_scales(row):
    root = {name: math.sqrt(max(row[name], 0.0)) if row[name] == row[name] else 0.0 for name in row}
    return {
        "update_square_sum": row["update_square_sum"],
        "update_before_square_sum": row["update_before_square_sum"],
        "update_used_square_sum": row["update_used_square_sum"],
        "update_dot": root["update_used_square_sum"] * root["update_square_sum"],
        "update_loss_dot": math.inf,  # the caller checks it: its gradient is not in the row
    }


def expected_update(used, before, after, loss=None):
    """The columns of `fields.UPDATES` by name."""
    places = [(w, b - w, i) for i, (w, b) in enumerate(zip(before, after, strict=True)) if math.isfinite(b - w)]
    row = {
        "update_numel": len(before),
        "update_square_sum": total(dw * dw for _, dw, _ in places),
        "update_before_square_sum": total(w * w for w, _, _ in places),
        "update_nonfinite": sum(not math.isfinite(w) for w in after),
    }
    row |= {f.name: 0 if f.dtype == "int64" else math.nan for f in fields.UPDATES if f.name not in row}
    if used is not None:
        pairs = [(used[i], dw) for _, dw, i in places if math.isfinite(used[i])]
        row["update_used_square_sum"] = total(g * g for g, _ in pairs)
        row["update_dot"] = total(g * dw for g, dw in pairs)
        row["update_moving"] = sum(g != 0 and dw != 0 for g, dw in pairs)
        row["update_against"] = sum((g > 0 and dw > 0) or (g < 0 and dw < 0) for g, dw in pairs)
        row["update_stuck"] = sum(g != 0 and dw == 0 for g, dw in pairs)
    if loss is not None:
        row["update_loss_dot"] = total(loss[i] * dw for _, dw, i in places if math.isfinite(loss[i]))
        row["update_loss_exact"] = 1.0
    return row


def check_update(row, used, before, after, loss=None):
    """A row of `compare` is right about these lists of reals."""
    expected = expected_update(used, before, after, loss)
    scale = update_scales(expected)
    if loss is not None:
        moved = [(g, b - w) for g, w, b in zip(loss, before, after, strict=True)]
        scale["update_loss_dot"] = total(abs(g * dw) for g, dw in moved if math.isfinite(g) and math.isfinite(dw))
    for field, value in zip(fields.UPDATES, row.tolist(), strict=True):
        assert same(value, expected[field.name], scale.get(field.name, 0.0)), (field.name, value, expected[field.name])


def sparse(rows, columns, values):
    """An embedding's gradient of `[rows, 3]`, not coalesced."""
    at = torch.tensor([columns], dtype=torch.int64)
    return torch.sparse_coo_tensor(at, values, (rows, 3), check_invariants=True)
