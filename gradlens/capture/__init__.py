"""A live model turned into events: which tensors hold the partials, of which step, backward and stage.

Hooks only note; tensors are read at the end of the backward pass, or inside the hook where they do not live that long. What
was seen goes to a sink as an event, one way. Nothing here computes a statistic, and nothing of ours is raised.

- `attachment`: names, and hooks put on and taken off parameters; `sharding`: what a rank holds of one.
- `engine`: which backward pass a hook belongs to.
- `arrivals`: how each gradient arrives in a pass, a state a slot.
- `optimizers`: who steps.
- `step`: what is known of the step that is open, and dropped when it closes; `marks`: what was in `.grad`.
- `readings`: which tensors are read, and why a row has none; `provenance`: whose numbers may stand for whose.
- `watcher`: the owner of the step, to whom engine and optimizers report.
- `events`: what goes out. `guards`: what torch calls is guarded, and listed. `scaling`: the gradient scaler.
"""
