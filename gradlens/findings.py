"""Every finding that no rule makes: what was asked for and cannot be had, and what went wrong on the way.

`CATALOGUE` has each by its name, with what it says, for the docs; the words of each are here too, whoever finds it.
"""

from __future__ import annotations

from collections.abc import Sequence

from gradlens.records import Finding, Severity, Stage

CATALOGUE = {
    "evidence-unavailable": "the feature `evidence` without the stage `backward`, on which it rests",
    "evidence-left-out": "backwards while the weights may move within the step: evidence does without them",
    "updates-unavailable": "the feature `updates` without the stage `used`, on whose rows it stands",
    "cut": "a loss that depends on no parameter of the model: it was detached, or re-created",
    "unregistered": "parameters that the loss depends on and that neither the model nor an optimizer has",
    "memory": "an allowance that has no room for even one weight of each parameter",
    "activations-unavailable": "the feature `activations`, and modules that are compiled or not called, or no backward pass",
    "reduced-unavailable": "the stage `reduced` in one process",
    "not-averaged": "the stage `reduced`, and no backward that ended with averaged gradients, or parameters left out",
    "unknown-optimizer": "an optimizer that moves watched parameters, and that `watch()` was not given",
    "foreign-parameters": "an optimizer whose parameters are not the model's: copies, or another model's",
    "idle-optimizer": "the optimizer that ends steps does not step, and another one does",
    "many-backwards": "more backwards in one step than are read",
    "written-by-hand": "`.grad` is written by hand, and no backward reaches the parameters",
    "scaler-found": "a `GradScaler` that `watch()` was not given",
    "watched-already": "a model that another open lens watches",
    "used-unknown": "weights moved by hand, and gradients gone before `used` could be read",
    "partial-gradient": "gradients that are summands which the ranks have yet to add",
    "read-at-step": "FSDP1's original parameters, whose gradients are read at the optimizer's step only",
    "flat-parameters": "FSDP1 without original parameters: rows of what it has flattened",
    "ranks-apart": "ranks that do not meet at an address: the dashboard shows the first one's own table",
    "ranks-missing": "ranks of which nothing came in time for the dashboard",
    "cuda-graph": "CUDA graphs, whose replays run no hook",
    "budget": "a budget below what a step that is not observed costs already",
    "records-thinned": "steps left out of the records, as writing was slower than training",
    "records-torn": "the end of a run that was cut off, as by `kill -9`: it is read up to its last whole batch",
    "records-damaged": "a file of a run that does not read",
    "writer-failed": "a writer that raised, and is switched off; an error where it is the store, as nothing is on disk then",
    "recorder-stuck": "a rule, a writer or a callback that does not return: records go on without it",
    "findings-bounded": "a rule that has found 2,000 things: more are counted and not kept",
    "findings-left-out": "at the end, how many that were",
    "gradlens-fault": "a failure of gradlens itself; training is not affected",
}


def few(names: Sequence[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _of(names: Sequence[str]) -> dict[str, object]:
    return {"parameter": names[0] if names else None, "parameters": tuple(names)}


# --- what was asked for --------------------------------------------------------------------------------------------


def evidence_unavailable(step: int, read: str) -> Finding:
    """Evidence without the backwards that it rests on."""
    return Finding(
        rule="evidence-unavailable",
        step=step,
        severity=Severity.WARNING,
        seen=f"`evidence` rests on each backward's own partials; the stages read are {read}",
        causes=("stage= leaves them out, or there are several ranks, where `backward` is on request",),
        remedy='add "backward" to stage=, or ask gradlens.survey()',
    )


def updates_unavailable(step: int, read: str) -> Finding:
    """Updates without the rows that they stand on."""
    return Finding(
        rule="updates-unavailable",
        step=step,
        severity=Severity.INFO,
        seen=f"`updates` stand on the rows of stage `used`; the stages read are {read}, so those columns are empty",
        causes=("stage= leaves it out",),
        remedy='add "used" to stage=',
    )


def no_memory(step: int, what: str, needed: int) -> Finding:
    """An allowance without room."""
    return Finding(
        rule="memory",
        step=step,
        severity=Severity.WARNING,
        seen=f"memory= has no room for even one weight of each parameter: the columns of {what} are empty",
        causes=("memory= is 0, or very small",),
        remedy=f"give memory= more, up to the {needed:,} bytes of every weight; or features=() to do without",
    )


def reduced_unavailable(step: int) -> Finding:
    """One process has nothing to average over."""
    return Finding(
        rule="reduced-unavailable",
        step=step,
        severity=Severity.INFO,
        seen="there is one process, and nothing to average over: `reduced` rows are this process's own `.grad`",
        causes=("torch.distributed is not initialised, or was not when watch() was called",),
        remedy="read `accumulated`, which is the same here, or call watch() after init_process_group()",
        stage=Stage.REDUCED.value,
    )


# --- optimizers -----------------------------------------------------------------------------------------------------


def unknown_optimizer(step: int, kind: str, names: Sequence[str]) -> Finding:
    """An optimizer stepped that `watch()` was not given."""
    return Finding(
        rule="unknown-optimizer",
        step=step,
        severity=Severity.WARNING,
        seen=f"{kind} stepped on {len(names)} of the watched parameters ({few(names)}), and watch() was not given it: its "
        "steps are not counted, and what it does to the weights is not measured",
        causes=("watch() was given some of the optimizers only", "the optimizer was made again after watch()"),
        remedy="give watch() all that move the model, last the one whose step ends a step: watch(model, [a, b]). Where one "
        f"replaces another: lens.close(), then watch(model, optimizer, first_step={step})",
        **_of(names),  # type: ignore[arg-type]
    )


_REPLACED = "the optimizer was made before the model's layers were replaced, or for another model"


def foreign_parameters(
    step: int, kind: str, foreign: int, held: int, shapes: str, *, covered: bool, copies: bool = False
) -> Finding:
    """An optimizer moves tensors that are not the model's.

    `covered`: all that is watched has an optimizer all the same. `copies`: they have the shapes of the model's, all of them.
    """
    some = "none" if foreign == held else f"only {held - foreign}"
    seen = (
        f"{some} of the {held} parameters of the optimizer ({kind}) are the model's: {foreign} are not (shapes {shapes}); "
    )
    if foreign == held:
        seen += (
            "its steps are counted and the gradients that backward() leaves in the model are read, but what it consumes "
            "and what it does to the weights is not measured"
        )
        copied = "the optimizer moves copies of the weights, as mixed precision by hand keeps them in float32"
        causes = (copied, _REPLACED) if copies else (_REPLACED, copied)
        remedy = (
            'watch the copies too: watch({"": model, "master": copy, ...}, optimizer); names map to plain tensors as well'
            if copies
            else "make the optimizer from model.parameters() when the model is complete; copies can be watched too"
        )
    else:
        seen += "no row has them"
        part = "watch() was given a part of the model, and the optimizer all of it"
        causes = (part, _REPLACED) if covered else (_REPLACED, part)
        remedy = "watch the whole model, with select= for a part of its rows; or make the optimizer after the last change"
    severity = Severity.INFO if covered else Severity.WARNING
    return Finding(rule="foreign-parameters", step=step, severity=severity, seen=seen, causes=causes, remedy=remedy)


def idle_optimizer(step: int, idle: str, steps: int, stepping: str) -> Finding:
    """Another optimizer ends steps now."""
    return Finding(
        rule="idle-optimizer",
        step=step,
        severity=Severity.INFO,
        seen=f"{idle}, which was listed last and ends a step, has not stepped while {stepping} stepped {steps} times: until "
        f"it does, each step of {stepping} ends one",
        causes=("it starts later, as a generator does after its critic", "it is listed and not used"),
        remedy="nothing, if that is meant; else list the optimizer last whose step ends a step",
    )


def activations_unavailable(step: int, compiled: Sequence[str]) -> Finding:
    """Modules whose outputs are not seen: compiled ones, or all, where no forward hook was called before a backward."""
    return Finding(
        rule="activations-unavailable",
        step=step,
        severity=Severity.INFO,
        seen=f"{len(compiled)} compiled modules ({few(compiled)}) have no activations: hooks inside would change what is "
        "compiled"
        if compiled
        else "a backward pass came before any module of the model was called, so there are no activations of it",
        causes=()
        if compiled
        else ("the model was compiled after watch()", "its modules are called by torch.func or by hand"),
        remedy="watch a run without torch.compile to see them",
    )


def activations_without_backward(step: int) -> Finding:
    """An optimizer stepped after forward passes, and no backward pass came, which rows of activations belong to."""
    return Finding(
        rule="activations-unavailable",
        step=step,
        severity=Severity.INFO,
        seen="modules of the model were called, and the step ended without a backward pass, so there are no activations",
        causes=("its gradients come from torch.autograd.grad, which tells no hook where it begins and ends",),
        remedy="loss.backward(), or loss.backward(inputs=...), instead of torch.autograd.grad",
    )


def many_backwards(step: int, read: int) -> Finding:
    """The next backwards of this step are only counted."""
    return Finding(
        rule="many-backwards",
        step=step,
        severity=Severity.INFO,
        seen=f"more than {read} backwards came without an optimizer's step: from then on they are counted and not read "
        "until the step ends, and its `used` rows compare with no backward",
        causes=("gradients of single examples are summed up, as for the Fisher information", "no optimizer ever steps"),
        remedy="close the lens before such a pass and watch again after it; or lens.step() ends a step where there is no "
        "optimizer",
    )


def written_by_hand(step: int, names: Sequence[str]) -> Finding:
    """No backward reached these parameters in this step, and their `.grad` is new."""
    return Finding(
        rule="written-by-hand",
        step=step,
        severity=Severity.INFO,
        stage=Stage.USED.value,
        seen=f"`.grad` of {len(names)} parameters ({few(names)}) is new, and no backward reached any of them in this step: "
        "it was written by hand. `used` rows have what the optimizer consumed; there is no `backward` of it",
        causes=("evolution strategies, Reptile, per-example clipping or another rule that makes its own gradients",),
        remedy="nothing, if that is meant",
        **_of(names),  # type: ignore[arg-type]
    )


def scaler_found(step: int, scale: object) -> Finding:
    """A scaler steps the optimizer, and `watch()` was not given it."""
    known = f"its scale is {scale:g} now" if isinstance(scale, float) else "its scale is on a device"
    return Finding(
        rule="scaler-found",
        step=step,
        severity=Severity.INFO,
        seen=f"a GradScaler calls the optimizer's step ({known}), and watch() was not given it: it is used from here on, "
        "and earlier backwards of this step may stand in the records multiplied by the scale",
        causes=("watch() was called without scaler=, or before the scaler was made",),
        remedy="watch(model, optimizer, scaler=scaler)",
    )


def watched_already(step: int, names: Sequence[str], since: int) -> Finding:
    """Another lens that is open watches these."""
    return Finding(
        rule="watched-already",
        step=step,
        severity=Severity.INFO,
        seen=f"{len(names)} of these parameters ({few(names)}) are watched by {since} other open lens"
        f"{'es' if since > 1 else ''}: each costs its time at every step",
        causes=("a notebook cell that calls watch() ran again",),
        remedy="close the old one (lens.close()), or let this one take its place: watch(..., replace=True)",
        **_of(names),  # type: ignore[arg-type]
    )


def used_unknown(step: int) -> Finding:
    """Without an optimizer, what the loop consumed was gone when the step ended."""
    return Finding(
        rule="used-unknown",
        step=step,
        severity=Severity.INFO,
        stage=Stage.USED.value,
        seen="there is no optimizer to listen to, and gradients were cleared or changed before the next backward: what the "
        "loop consumed is not known, so `used` rows have the weights' move and no gradient",
        causes=("weights are moved by hand, after clipping perhaps, and zero_grad() comes before the next backward",),
        remedy="call lens.step() after the weights have moved and before zero_grad()",
    )


def records_thinned(steps: Sequence[int]) -> Finding:
    """Writing was slower than training, and these steps were left out."""
    first, last = steps[0], steps[-1]
    missing = f"{len(steps)} observed step{'s' * (len(steps) > 1)} from {first} to {last}"
    return Finding(
        rule="records-thinned",
        step=first,
        severity=Severity.WARNING,
        seen=f"{missing} left no record: writing was slower than training",
        causes=("a slow disk or network file system", "very short steps", "a slow rule or writer"),
        remedy="look less often (schedule=10), select fewer parameters, or write to a local disk",
        value=float(len(steps)),
    )


# --- ranks ----------------------------------------------------------------------------------------------------------


def not_averaged(step: int) -> Finding:
    """No backward of the step ended with averaged gradients."""
    return Finding(
        rule="not-averaged",
        step=step,
        severity=Severity.INFO,
        stage=Stage.REDUCED.value,
        seen="no backward of this step ended with gradients that were averaged over ranks, so there is nothing to read as "
        "`reduced`; this is said once",
        causes=(
            "gradients are averaged by hand between backward() and the optimizer's step",
            "the model is under neither DistributedDataParallel nor fully_shard",
            "the optimizer's step came after no_sync() alone",
        ),
        remedy="read the stage `used`: what the optimizer consumed, however it was averaged",
    )


def not_sharded(step: int, names: Sequence[str]) -> Finding:
    """FSDP2 does not average these."""
    return Finding(
        rule="not-averaged",
        step=step,
        severity=Severity.INFO,
        stage=Stage.REDUCED.value,
        seen=f"{len(names)} parameters ({few(names)}) are not among those that FSDP2 shards and averages: they have no "
        "`reduced` rows",
        causes=("fully_shard(..., ignored_params=...)", "fully_shard was called on parts of the model only"),
        remedy="average their gradients before the optimizer's step, or the ranks' copies drift apart; `used` has what it "
        "consumed",
        **_of(names),  # type: ignore[arg-type]
    )


def read_at_step(step: int) -> Finding:
    """FSDP1 suppresses the hooks of its original parameters."""
    return Finding(
        rule="read-at-step",
        step=step,
        severity=Severity.INFO,
        stage=Stage.USED.value,
        seen="FSDP1 lets no hook on its original parameters fire: their gradients are read at the optimizer's step, as "
        "`used`, and no other stage has rows",
        remedy="give watch() the optimizer, without which there is no step to read at; fully_shard (FSDP2) has `reduced` "
        "gradients too",
    )


def flat_parameters(step: int) -> Finding:
    """FSDP1 shows flat parameters only."""
    return Finding(
        rule="flat-parameters",
        step=step,
        severity=Severity.INFO,
        seen="FSDP1 has made flat parameters of several: each row is of this rank's part of one, padding included, and in "
        "`backward` of the whole of this rank's own flat gradient; no row is of a parameter that you named",
        remedy="FullyShardedDataParallel(..., use_orig_params=True) has rows by name at the optimizer's step; fully_shard "
        "(FSDP2) when a backward ends, too",
    )


def partial_gradient(step: int, stage: str, names: Sequence[str]) -> Finding:
    """These gradients are summands that the ranks have yet to add."""
    return Finding(
        rule="partial-gradient",
        step=step,
        stage=stage,
        severity=Severity.INFO,
        seen=f"the gradients of {len(names)} parameters ({few(names)}) are summands that the ranks have yet to add "
        "(placement Partial): their statistics are of this rank's summand, not of the gradient",
        causes=("tensor parallel replicates a norm layer whose input is sharded by sequence",),
        remedy="read them as local; reduce them before the optimizer's step if their placement is not meant",
        **_of(names),  # type: ignore[arg-type]
    )


def ranks_apart(step: int) -> Finding:
    """The process group met in a file."""
    return Finding(
        rule="ranks-apart",
        step=step,
        severity=Severity.INFO,
        seen="the process group met in a file, which would grow with all that is sent through it: the dashboard shows the "
        "first rank's own table",
        remedy="meet at an address (torchrun does; init_method='env://' or 'tcp://...'); open_run() pools the records",
    )


# --- gradlens itself ------------------------------------------------------------------------------------------------


def cuda_graph(step: int) -> Finding:
    """A step was captured as a CUDA graph."""
    return Finding(
        rule="cuda-graph",
        step=step,
        severity=Severity.WARNING,
        seen="a step was captured as a CUDA graph: it was not read, nor will replays be, for no hook runs in them",
        remedy="watch the steps before the capture, or train without the graph for as long as you want to look",
    )


def evidence_left_out(step: int, why: str) -> Finding:
    """Evidence does without some gradients."""
    return Finding(
        rule="evidence-left-out",
        step=step,
        severity=Severity.INFO,
        seen=f"evidence does without some gradients: {why}",
        remedy="gradlens.survey() gives verdicts at fixed weights for any model",
    )


def floor_above_budget(step: int, share: float, budget: float) -> Finding:
    """A step that is not observed costs more than the budget."""
    return Finding(
        rule="budget",
        step=step,
        severity=Severity.INFO,
        seen=f"a step that is not observed costs {share:.1%} of its time already, and the budget is {budget:.1%}: it cannot "
        "be kept by looking less often",
        causes=("very short steps: the optimizer's hooks cost some microseconds, whatever is observed",),
        remedy=f"a budget above {share:.1%}, or longer steps; lens.overhead() says what is spent on what",
        value=share,
    )


def fault(step: int, text: str) -> Finding:
    """Something of gradlens failed."""
    return Finding(
        rule="gradlens-fault",
        step=step,
        severity=Severity.WARNING,
        seen=f"gradlens failed in {text}; training is not affected",
        remedy="please report this with the traceback of gradlens' warning",
    )


# --- run directories --------------------------------------------------------------------------------------------------


def records_torn(step: int, file: str, torn: int) -> Finding:
    """The last writer was killed within a record."""
    return Finding(
        rule="records-torn",
        step=step,
        severity=Severity.INFO,
        seen=f"the last writer of {file} stopped within a record: {torn:,} bytes at its end were dropped",
        causes=("the process was killed", "the disk was full"),
        remedy="nothing: all whole records before it are there",
    )


def records_damaged(step: int, error: str) -> Finding:
    """A file that does not read."""
    return Finding(
        rule="records-damaged",
        step=step,
        severity=Severity.WARNING,
        seen=f"a file of an earlier writer was left as it is: {error}",
        causes=("a faulty disk", "another program wrote to it"),
        remedy="move it away; the rest of the run reads then",
    )


# --- what is written -----------------------------------------------------------------------------------------------------


def writer_failed(step: int, name: str, error: BaseException, *, durable: bool) -> Finding:
    """A writer raised."""
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Finding(
        rule="writer-failed",
        step=step,
        severity=Severity.ERROR if durable else Severity.WARNING,
        seen=f"{name} failed and is switched off: {what}"
        + (f"; nothing is recorded on disk from about step {step} on" if durable else ""),
        causes=("the disk is full, or the directory was removed or cannot be written",)
        if isinstance(error, OSError)
        else ("a fault in the writer, or in what it writes to",),
        remedy="training and the other writers go on, and what is in memory can be asked; for records on disk, watch again "
        "with a directory that can be written"
        if durable
        else "training and the other writers go on; mend the writer",
    )


def too_many(finding: Finding, kept: int) -> Finding:
    """A rule found more than is kept."""
    return Finding(
        rule="findings-bounded",
        step=finding.step,
        severity=Severity.WARNING,
        seen=f"{finding.rule} has found {kept:,} things; what it finds from here on is counted and not kept",
        causes=("a rule that finds something new at nearly every step",),
        remedy="make its threshold stricter, or have it ask that something lasts (gradlens.rules.lasting)",
        value=float(kept),
    )


def left_out(step: int, rule: str, times: int, kept: int) -> Finding:
    """What it found in all."""
    return Finding(
        rule="findings-left-out",
        step=step,
        severity=Severity.INFO,
        seen=f"{rule} found {times:,} things in all, of which the first {kept:,} were kept",
        value=float(times - kept),
    )


def recorder_stuck(step: int, within: str, seconds: float, what: str) -> Finding:
    """Somebody's function keeps the recorder's thread."""
    return Finding(
        rule="recorder-stuck",
        step=step,
        severity=Severity.WARNING,
        seen=f"{within} has not returned for {seconds:g} seconds: {what}",
        causes=("it waits for something that does not come: a lock, a network, an answer of its own thread",),
        remedy="give it a timeout; records on disk go on without it",
    )


def ranks_missing(step: int, ranks: Sequence[int], patience: float) -> Finding:
    """Nothing came of these in time."""
    some = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return Finding(
        rule="ranks-missing",
        step=step,
        severity=Severity.WARNING,
        seen=f"nothing of {len(ranks)} rank{'s' * (len(ranks) > 1)} ({some}) came within {patience:g} s: the dashboard goes "
        "on without them, and has them again when they come",
        causes=("a rank died or hangs", "it does not watch, or looks at other steps", "it has no run= directory"),
        remedy="look at that rank's output; its own records are in its segment of the run directory",
        value=float(len(ranks)),
    )
