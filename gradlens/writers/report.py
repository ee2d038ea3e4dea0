"""What was seen as a page of plain text that a person reads in a minute.

    title            the run: its steps, its size, its loss
    DIAGNOSIS        what is wrong, and what follows from that
    HEALTH           what was found, worst first, and what to do about it
    LAYER FLOW       how the size of the partials changes from layer to layer
    DIRECTIONS       which parameters want to move where, and how far the optimizer moved them
    MOST SENSITIVE   the ten weights to which the loss answers most
    UPDATES          what the steps were like
    ACTIVATIONS      what modules make of a batch, where that was asked for
    NOISE            how noisy a micro-batch's gradient is, where gradients were accumulated
    COST             what looking at all this took

Lines are at most `WIDTH` wide and are ASCII, but for names. A model of many parameters shows the most telling ones: those
that something is wrong with, then those whose weights most agree on a direction, so that chance does not explain it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from gradlens import fields
from gradlens.analysis.diagnosis import Diagnosis
from gradlens.analysis.history import History
from gradlens.analysis.rules.base import format_number, layout
from gradlens.noise import measured
from gradlens.records import COMPLEX, Finding, Parameters, Severity, Snapshot, Stage, Status, directions, total

WIDTH = 100
NAME, BAR = 28, 12  #: characters of a parameter's name, and of the picture of its directions
ALL, SHOWN = 20, 16  #: a model of up to `ALL` parameters has a row each, a larger one the `SHOWN` most telling
WEIGHTS = 10  #: of the most sensitive
LAYERS = 24  #: of a deeper model, as many evenly spread
GROUPS, NAMED = 5, 3  #: of findings, and parameters that a group names

NOTHING = "Nothing was captured yet: no backward() has reached a watched parameter."
USUAL = "about 1e-03 is usual"


def text(
    history: History,
    found: Sequence[Finding],
    *,
    overhead: str = "",
    title: str = "gradlens",
    steps: Sequence[int] | None = None,
    losses: Mapping[int, float] | None = None,
    diagnosis: Diagnosis | None = None,
) -> str:
    """The page. `steps` and `losses` are the whole run's, where `history` has only the newest of it."""
    if not len(history):
        return "\n".join([title, NOTHING, *_health(found)] if found else [title, NOTHING])
    now, used = history.at(), _last_update(history)
    blocks = [
        [title, *_run(history, now, steps, losses)],
        [] if diagnosis is None else _diagnosed(diagnosis),
        _health(found, diagnosis),
        _flow(now),
        _directions(now, used, found),
        _sensitive(history),
        [] if used is None else _updates(now, used),
        _activations(history),
        _noise(history),
        ["COST", *_wrapped(overhead)] if overhead else [],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def brief(
    history: History,
    found: Sequence[Finding],
    *,
    steps: Sequence[int] | None = None,
    losses: Mapping[int, float] | None = None,
    more: str = "report() has the whole page.",
    diagnosis: Diagnosis | None = None,
) -> str:
    """The page's first lines: the run, its health, and the weight to which the loss answers most."""
    if not len(history):
        return f"gradlens: {NOTHING[0].lower()}{NOTHING[1:]}"
    lines = [
        f"gradlens: {line.strip()}" if not i else line for i, line in enumerate(_run(history, history.at(), steps, losses))
    ]
    verdict = "" if diagnosis is None else diagnosis.verdict
    lines += textwrap.wrap(verdict, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False)
    lines.append(f"  health: {_counted(found)}")
    lines += [f"    {_heading(group)}" for group in _grouped(found)[:NAMED]]
    for name, value, partial in _top(history, 1):
        lines.append(f"  most sensitive: {name} = {format_number(value)}, partial {_signed(partial)}: {_toward(partial)}")
    return "\n".join([*map(_fit, lines), f"  {more}"])


def explain(
    name: str,
    at: tuple[int, ...],
    *,
    value: float,
    partial: float,
    rank: int,
    numel: int,
    history: Sequence[float] = (),
    evidence: str = "",
) -> str:
    """One paragraph on one weight.

    Args:
        name: The parameter.
        at: The weight's index in it.
        value: What the weight is.
        partial: dL/dw.
        rank: 1 where no partial of the parameter is larger in size.
        numel: How many weights the parameter has.
        history: The weight's partials on the steps of which they were kept, oldest first.
        evidence: What several gradients say of its direction, in sentences.
    """
    weight = named(name, at)
    sentences = [f"{weight} is {value:.6g}.", *_meaning(partial)]
    if numel > 1 and math.isfinite(partial):
        sentences.append(_compared(name, rank, numel))
    if len(history) > 1:
        sentences.append(_behaviour(history, numel))
    if evidence:
        sentences.append(evidence)
    elif math.isfinite(partial) and partial:
        sentences.append(
            "One mini-batch's sign is no verdict: another batch may ask for the opposite, and does for many weights. "
            "gradlens.survey() asks several batches and says how sure a direction is."
        )
    return _paragraph(" ".join(sentences), weight)


def named(name: str, at: tuple[int, ...]) -> str:
    """A weight's name, `fc1.weight[3, 17]`; a scalar has its parameter's."""
    return f"{name}[{', '.join(map(str, at))}]" if at else name


# --- the run --------------------------------------------------------------------------------------------------------


def _run(
    history: History, now: Snapshot, steps: Sequence[int] | None = None, losses: Mapping[int, float] | None = None
) -> list[str]:
    steps = history.steps() if steps is None else steps
    seen = f"step {steps[0]}" if len(steps) == 1 else f"{len(steps):,} steps, {steps[0]} to {steps[-1]}"
    weights = int(now.columns["numel"].sum())
    ranks = f", pooled from {now.ranks} ranks" if now.ranks > 1 else ""
    size = f"{len(now):,} parameter{'s' * (len(now) != 1)}, {weights:,} weight{'s' * (weights != 1)}{ranks}"
    return [f"  {seen}: {size}", f"  {_loss(history, losses)}"]


def _loss(history: History, losses: Mapping[int, float] | None) -> str:
    seen = {s.step: s.loss for s in history if not math.isnan(s.loss)} if losses is None else losses
    if not seen:
        return "no loss: lens.observe(loss=loss) puts it beside the gradients"
    first, last = min(seen), max(seen)
    lowest = min(seen, key=seen.__getitem__)
    if first == last:
        return f"loss {format_number(seen[first])} at step {first}"
    return (
        f"loss {format_number(seen[first])} at step {first}, {format_number(seen[last])} at step {last}; "
        f"lowest {format_number(seen[lowest])} at step {lowest}"
    )


# --- diagnosis ------------------------------------------------------------------------------------------------------


def _diagnosed(diagnosis: Diagnosis) -> list[str]:
    """The verdict, what was seen and what to do; what follows from it is named, and no more."""
    origin = diagnosis.origin
    sure = f" ({diagnosis.sure} sure)" if origin is not None else ""
    lines = [f"DIAGNOSIS{sure}", *_wrapped(diagnosis.verdict)]
    if origin is not None:
        lines += _wrapped(f"seen: {origin.seen}", "    ")
        lines += _wrapped(f"do: {origin.remedy}", "    ") if origin.remedy else []
    for words, found in diagnosis.groups():
        if found:
            lines += _wrapped(f"{words}: {', '.join(dict.fromkeys(f.rule for f in found))}", "    ")
    return lines


# --- health ---------------------------------------------------------------------------------------------------------


def _health(found: Sequence[Finding], diagnosis: Diagnosis | None = None) -> list[str]:
    """What was found; of what the diagnosis has said, or what follows from that, the headings."""
    origin = None if diagnosis is None else diagnosis.origin
    follows = set() if diagnosis is None else {finding.rule for finding in diagnosis.follows}
    groups = _grouped(found)
    if origin is not None:
        groups.sort(key=lambda group: (group[0].rule != origin.rule, group[0].rule in follows))
    lines = [f"HEALTH: {_counted(found)}", *([] if origin is not None else _beginning(groups))]
    for group in groups[:GROUPS]:
        lines.append(_fit(f"  {_heading(group)}"))
        if origin is not None and group[0].rule == origin.rule:
            continue
        if origin is not None and group[0].rule in follows:
            lines.append(f"    follows from {origin.rule}")
            continue
        lines += _wrapped(group[0].seen, "    ")
        if group[0].causes:
            lines += _wrapped(f"likely: {'; '.join(group[0].causes)}", "    ")
        if group[0].remedy:
            lines += _wrapped(f"do: {group[0].remedy}", "    ")
    if len(groups) > GROUPS:
        lines.append(f"  and {len(groups) - GROUPS} more kinds, less severe or later: findings() has all")
    return lines


def _beginning(groups: Sequence[list[Finding]]) -> list[str]:
    """What came first, where that is not what is worst: the others may follow from it."""
    ill = [group for group in groups if group[0].severity != Severity.INFO]
    if not ill or (first := min(ill, key=lambda group: group[0].step))[0].step == ill[0][0].step:
        return []
    return [_fit(f"  it began with {first[0].rule} at step {first[0].step}: what came later may follow from that")]


def _grouped(found: Iterable[Finding]) -> list[list[Finding]]:
    """What one rule says with the same advice, together; the worst first, then the earliest."""
    groups: dict[tuple[object, ...], list[Finding]] = {}
    for finding in sorted(found, key=lambda finding: (-finding.severity.rank, finding.step)):
        groups.setdefault((finding.severity, finding.rule, finding.causes, finding.remedy), []).append(finding)
    return list(groups.values())


def _counted(found: Sequence[Finding]) -> str:
    if not found:
        return "no rule found anything"
    counts = {severity: sum(f.severity == severity for f in found) for severity in reversed(Severity)}
    return ", ".join(f"{n} {word}{'s' * (n > 1 and word != Severity.INFO)}" for word, n in counts.items() if n)


def _heading(group: Sequence[Finding]) -> str:
    first = group[0]
    names = list(dict.fromkeys(_place(finding) for finding in group))
    where = ", ".join(names[:NAMED]) + f" and {len(names) - NAMED} more" * (len(names) > NAMED)
    since = "at" if len({finding.step for finding in group}) == 1 else "from"
    return f"{first.severity.upper()} {first.rule}, {since} step {first.step}: {where}"


def _place(finding: Finding) -> str:
    return finding.parameter or (f"{len(finding.parameters)} parameters" if finding.parameters else "the model")


# --- layer flow -----------------------------------------------------------------------------------------------------


def _flow(now: Snapshot) -> list[str]:
    """How the size of the partials changes from the first weight matrix to the last, in powers of ten."""
    rows = [
        row
        for row, shape in enumerate(now.parameters.shapes)
        if len(shape) > 1 and now.status[row] in (Status.OK, Status.ZERO, Status.NONFINITE)
    ]
    sizes = fields.derive("rms", now.columns)[rows]
    known = [i for i, size in enumerate(sizes.tolist()) if 0 < size < math.inf]
    if len(rows) < 2 or not known:
        return []
    first, last, least, most = known[0], known[-1], min(known, key=sizes.__getitem__), max(known, key=sizes.__getitem__)

    def sized(at: int) -> str:
        return f"{format_number(sizes[at])} ({_cut(now.names[rows[at]], NAME)})"

    below = [_decades(size, sizes[most]) for size in sizes.tolist()]
    shown = [below[at] for at in np.linspace(0, len(below) - 1, min(len(below), LAYERS)).round().astype(int).tolist()]
    picture = "powers of ten below the largest, from layer to layer"
    lines = ["LAYER FLOW: the size (rms) of the partials of the weight matrices, in the model's order"]
    lines += _wrapped(f"first {sized(first)}, last {sized(last)}; smallest {sized(least)}, largest {sized(most)}")
    part = f" ({LAYERS} of {len(below):,})" if len(shown) < len(below) else ""
    return [*lines, f"  {picture}{part}:", f"    {' '.join(shown)}"]


def _decades(size: float, largest: float) -> str:
    """0 for what is as large; `none` of partials that are all 0, `nan` where they are not finite."""
    if not math.isfinite(size):
        return "nan"
    return f"{math.log10(largest / size):.0f}" if size > 0 else "none"


# --- directions -----------------------------------------------------------------------------------------------------


def _directions(now: Snapshot, used: Snapshot | None, found: Sequence[Finding]) -> list[str]:
    rows = _telling(now, found)
    which = f"the {len(rows)} most telling of {len(now):,} parameters" if len(rows) < len(now) else "by parameter"
    ratios = {} if used is None else dict(zip(used.names, used.column("update_ratio").tolist(), strict=True))
    whole = total(now)
    entries = [_entry(now.columns, row, now.names[row], now.status[row], ratios.get(now.names[row])) for row in rows]
    if len(now) > 1:
        moved = math.nan if used is None else float(fields.derive("update_ratio", total(used))[0])
        entries.append(_entry(whole, 0, "the whole model", Status.OK, moved))
    header = ("", "weights", "increase", "decrease", "hold", "+ up, - down", "rms", "|dw|/|w|")
    source = f"by the {now.stage} gradient of step {now.step}{_statuses(now)}"
    lines = [f"DIRECTIONS, {which}", *_wrapped(f"which share of its weights should move where to lower the loss, {source}")]
    lines += _aligned([header, *entries], "<>>>><>>")
    if len(rows) < len(now):
        lines.append(f"  and {len(now) - len(rows):,} more: table() has all")
    return lines


def _statuses(now: Snapshot) -> str:
    """How many parameters are not as they should be."""
    words, counts = np.unique(now.status.astype(str), return_counts=True)
    odd = [f"{count:,} {word}" for word, count in zip(words, counts, strict=True) if word != Status.OK]
    return f"; of {len(now):,} parameters {', '.join(odd)}" if odd else ""


def _telling(now: Snapshot, found: Sequence[Finding]) -> list[int]:
    """Rows, in model order: what is ill, then where the weights agree most, in standard errors of chance."""
    if len(now) <= ALL:
        return list(range(len(now)))
    ill = {name for finding in found for name in (finding.parameter, *finding.parameters)}
    marked = np.asarray([name in ill for name in now.names])
    odd = (now.status != Status.OK) & (now.status != Status.FROZEN)
    up, down = now.columns["negative"].astype(float), now.columns["positive"].astype(float)
    agreement = np.abs(up - down) / np.sqrt(np.maximum(up + down, 1))
    first = np.flatnonzero(odd)[: SHOWN // 3]
    second = np.flatnonzero(marked & ~odd)[: SHOWN // 3]
    rest = np.lexsort((np.arange(len(now)), -agreement, odd))
    return sorted(list(dict.fromkeys([*first.tolist(), *second.tolist(), *rest.tolist()]))[:SHOWN])


def _entry(columns: fields.Columns, row: int, name: str, status: str, ratio: float | None) -> tuple[str, ...]:
    shares = [float(fields.derive(f"{word}_share", columns)[row]) for word in ("increase", "decrease", "hold")]
    rms = float(fields.derive("rms", columns)[row])
    picture = _bar(*shares) if status == Status.OK else str(status)
    ratio = math.nan if ratio is None else ratio
    weights = _size(int(columns["numel"][row]))
    return (_cut(name, NAME), weights, *map(_percent, shares), picture, _plain(rms), _plain(ratio))


def _bar(up: float, down: float, hold: float) -> str:
    """Shares as a picture: `+` should increase, `.` hold, `-` decrease, `?` is not finite."""
    if math.isnan(up):
        return ""
    first, second, last = (round(BAR * share) for share in (up, up + hold, min(up + hold + down, 1.0)))
    return "+" * first + "." * (second - first) + "-" * (last - second) + "?" * (BAR - last)


# --- weights --------------------------------------------------------------------------------------------------------


def _sensitive(history: History) -> list[str]:
    top = _top(history, WEIGHTS)
    if not top:
        return []
    entries = [
        (_cut(name, 2 * NAME), format_number(value), _signed(partial), _toward(partial)) for name, value, partial in top
    ]
    lines = ["MOST SENSITIVE WEIGHTS: the loss answers most to these"]
    return lines + _aligned([("", "value", "partial", "to lower the loss"), *entries], "<>><")


def _top(history: History, k: int) -> list[tuple[str, float, float]]:
    """Name, value and partial of the `k` weights with the largest partials, of the last step read."""
    candidates = []
    for part in history.parts():
        if part.top is None:
            continue
        size = np.where(part.top.index >= 0, np.abs(part.top.partial), np.nan)
        for flat in np.argsort(-size, axis=None, kind="stable")[:k].tolist():
            row, column = divmod(flat, size.shape[1])
            if size[row, column] > 0:
                candidates.append((-float(size[row, column]), part, row, column))
    candidates.sort(key=lambda candidate: candidate[0])
    return [
        (
            named(part.names[row], _index(part.parameters, row, int(part.top.index[row, column]))),
            float(part.top.value[row, column]),
            float(part.top.partial[row, column]),
        )
        for _, part, row, column in candidates[:k]
        if part.top is not None
    ]


def _index(parameters: Parameters, row: int, flat: int) -> tuple[int, ...]:
    shape = parameters.shapes[row] + ((2,) if parameters.dtypes[row] in COMPLEX else ())
    return tuple(int(i) for i in np.unravel_index(flat, shape)) if shape else ()


def _toward(partial: float) -> str:
    return str(directions(np.asarray(partial)))


# --- updates --------------------------------------------------------------------------------------------------------


def _last_update(history: History) -> Snapshot | None:
    latest = history.latest(Stage.USED)
    return None if latest is None else history.at(latest.step, Stage.USED)


def _updates(now: Snapshot, used: Snapshot) -> list[str]:
    whole = total(used)
    lines = [f"UPDATES (step {used.step})", *_ratios(used)]

    def share(name: str) -> float:
        return float(fields.derive(name, whole)[0])

    if not math.isnan(share("alignment")):
        lines.append(
            f"  {_percent(share('against_share'))} of the weights moved against their own gradient; the update's cosine "
            f"with downhill is {share('alignment'):.2f}"
        )
    if not math.isnan(share("loss_change")):
        lines.append(f"  to first order the step changes its batch's loss by {_signed(share('loss_change'))}")
    if not math.isnan(share("flip_share")):
        lines.append(f"  {_percent(share('flip_share'))} of the weights' partials changed their sign since the step before")
    sampled = used.column("sampled")
    if unknown := _unknown(used):
        lines += _wrapped(unknown)
    if len(sampled) and np.nanmin(sampled) < 1:
        lines += _wrapped(
            f"updates and flips rest on a sample: {_percent(share('sampled'))} of all weights, at least "
            f"{_percent(float(np.nanmin(sampled)))} of each parameter (memory= allows more)"
        )
    elif not unknown and not math.isnan(share("alignment")):
        lines.append("  updates and flips rest on every weight")
    return lines if len(lines) > 1 else []


def _activations(history: History) -> list[str]:
    """What the modules made in the newest pass; of many, those that stand out: little spread, much dead or saturated."""
    if not history.activations:
        return []
    newest = history.activations[-1]
    columns = newest.columns()
    telling = np.nanmax(
        [1 - np.nan_to_num(columns["spread"], nan=1.0), columns["dead"], np.nan_to_num(columns["saturated"])], 0
    )
    rows = range(len(newest.modules))
    shown = rows if len(rows) <= ALL else sorted(sorted(rows, key=lambda row: -telling[row])[:SHOWN])
    lines = [
        f"ACTIVATIONS, by module (step {newest.step})",
        *_wrapped(
            "what each makes of a batch: its size, how much examples differ beside that, and how much is off or at an end"
        ),
        f"  {'':{NAME}}  {'':12}  {'rms':>8}  {'spread':>8}  {'dead':>5}  {'saturated':>9}",
    ]
    for row in shown:
        size, spread = (_plain(columns[name][row]) for name in ("rms", "spread"))
        dead, at_end = (_percent(value) if not math.isnan(value := columns[name][row]) else "" for name in _SHARES)
        name, kind = _cut(newest.modules[row], NAME), newest.types[row][:12]
        lines.append(f"  {name:{NAME}}  {kind:12}  {size:>8}  {spread:>8}  {dead:>5}  {at_end:>9}".rstrip())
    if len(shown) < len(rows):
        lines.append(f"  and {len(rows) - len(shown)} more: lens.activations() has them all")
    return lines


_SHARES = ("dead", "saturated")


def _unknown(used: Snapshot) -> str:
    """What the totals of moves leave out: parameters that moved, and of which the gradient that moved them is not known."""
    moved, told = np.isfinite(used.column("update_ratio")), np.isfinite(used.column("loss_change"))
    missing = moved & ~told
    if not missing.any() or not told.any():
        return ""
    sizes = used.column("numel")
    share = _percent(float(sizes[told].sum() / sizes[moved | told].sum()))
    return (
        f"the moves against, the cosine and the loss change rest on {int(told.sum())} of {int((moved | told).sum())} "
        f"parameters, {share} of the weights that moved: what moved the others is not in their .grad any more, as the "
        "optimizer writes over it"
    )


def _ratios(used: Snapshot) -> list[str]:
    """The update ratios of weights: biases, which may begin at 0, only where there is nothing else."""
    ratios = used.column("update_ratio")
    known = np.isfinite(ratios) & (used.status == Status.OK)
    matrices = known & layout(used.parameters).matrix
    rows = np.flatnonzero(matrices if matrices.any() else known)
    if not len(rows):
        return []
    order = rows[np.argsort(ratios[rows], kind="stable")]
    low, high = order[0], order[-1]
    if low == high:
        return [f"  |dw|/|w| is {format_number(ratios[low])} ({_cut(used.names[low], NAME)}); {USUAL}"]
    return _wrapped(
        f"|dw|/|w|: {format_number(float(np.median(ratios[rows])))} in the median of the weights, from "
        f"{format_number(ratios[low])} ({_cut(used.names[low], NAME)}) to "
        f"{format_number(ratios[high])} ({_cut(used.names[high], NAME)}); {USUAL}"
    )


# --- noise ----------------------------------------------------------------------------------------------------------


def _noise(history: History) -> list[str]:
    found = measured(history)
    return ["NOISE", *_wrapped(str(found))] if found.rows else []


# --- one weight -----------------------------------------------------------------------------------------------------

_NUDGE = 0.001


def _meaning(partial: float) -> list[str]:
    if not math.isfinite(partial):
        return [
            f"Its partial dL/dw is {partial}, which is no number to follow: the direction is undefined. Look for the first "
            "step with a value that is not finite in findings()."
        ]
    if not partial:
        return [
            "Its partial dL/dw is exactly 0: with every other weight held fixed, moving it a little leaves the loss as it "
            "is, to first order. The direction is hold."
        ]
    effect, other = ("lowers", "decrease") if partial < 0 else ("raises", "increase")
    return [
        f"Its partial dL/dw is {_signed(partial)}: with every other weight held fixed, raising it a little {effect} the "
        f"loss. To lower the loss it should {_toward(partial)}, and not {other}.",
        f"Raising it by {_NUDGE} would change the loss by about {_signed(_NUDGE * partial)}.",
    ]


def _compared(name: str, rank: int, numel: int) -> str:
    if rank == 1:
        return f"Of the {numel:,} weights of {name} it is the one to which the loss answers most."
    return f"By the size of its partial it is number {rank:,} of the {numel:,} weights of {name}."


def _behaviour(history: Sequence[float], numel: int) -> str:
    """How the sign went, in words."""
    signs = np.sign(np.asarray(history, np.float64))
    up, down = int((signs < 0).sum()), int((signs > 0).sum())
    moving = signs[(signs != 0) & np.isfinite(signs)]
    flips = int((moving[1:] != moving[:-1]).sum())
    kept = "" if numel <= fields.TOP else " where it was among the most sensitive of its parameter, and so was kept"
    asked = [f"increase on {up:,}" if up else "", f"decrease on {down:,}" if down else ""]
    sentence = f"Of the {len(history):,} recent steps{kept}, it should {' and '.join(filter(None, asked)) or 'move on none'}"
    times = "once" if flips == 1 else f"{flips:,} times"
    return f"{sentence}; its sign changed {times} from one to the next." if flips else f"{sentence}."


# --- text -----------------------------------------------------------------------------------------------------------


def _aligned(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Columns; `<` to the left, `>` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def _wrapped(words: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(
        words,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _paragraph(words: str, whole: str) -> str:
    """Lines of `WIDTH`, none of which ends within `whole`."""
    filled = textwrap.fill(words.replace(whole, "\0" * len(whole)), WIDTH, break_long_words=False, break_on_hyphens=False)
    return filled.replace("\0" * len(whole), whole)


def _fit(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 2] + ".."


def _cut(name: str, width: int) -> str:
    """A name that fits: what tells the blocks of a deep model apart, their numbers, is the last to go.

    `transformer.h.11.attn.c_attn.weight` becomes `tra..h.11.attn.c_attn.weight`, then `tra..11..c_attn.weight`.
    """
    if len(name) <= width:
        return name
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if numbers and numbers[0]:
        first, last = numbers[0], numbers[-1]
        begins = [f"{parts[0][:3]}..{'.'.join(parts[start:])}" for start in range(1, first + 1)]
        block = f"{parts[0][:3]}..{'.'.join(parts[first : last + 1])}"
        ends = [f"{block}..{'.'.join(parts[end:])}" for end in range(last + 2, len(parts))]
        found = next((cut for cut in begins + ends if len(cut) <= width), None)
        if found is not None:
            return found
    kept = (width - 2) * 2 // 3
    return f"{name[: width - 2 - kept]}..{name[-kept:]}"


def _percent(share: float) -> str:
    """Whole percents; what is not all or nothing does not look like it."""
    if math.isnan(share):
        return "-"
    if 0 < share < 0.005:
        return "<1 %"
    if 0.995 < share < 1:
        return ">99 %"
    return f"{100 * share:.0f} %"


def _plain(value: float) -> str:
    return "-" if math.isnan(value) else format_number(value)


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + format_number(value)


def _size(count: int) -> str:
    """Up to seven characters."""
    if count < 1_000_000:
        return f"{count:,}"
    for size, letter in ((10**9, "G"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    raise AssertionError
