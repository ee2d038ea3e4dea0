"""A live model turned into readings: which tensors hold the partials, of which step, backward and stage.

Hooks only note; tensors are read at the end of the backward pass, or inside the hook where they do not live that long. What
is read goes to a `sink` as a `Reading`, one way. Nothing here computes a statistic, and nothing of ours is raised.

- `attachment`: names, and hooks put on and taken off parameters.
- `gradients`: the backward pass, from hook to reading.
- `updates`: the optimizer's step, from hook to reading.
- `clock`: where a step opens and closes, and whether it is looked at.
- `scaling`: the gradient scaler, asked without a device sync.
- `compiling`: how torch.compile is kept from compiling us.
"""
