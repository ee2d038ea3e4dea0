"""Lists of tensors in, rows of numbers out: the one place where gradients are read.

`summarize(gradients, weights, previous) -> [n, fields.WIDTH]` and `compare(used, before, after, loss) -> [n, len(UPDATES)]`,
both float64, on the tensors' device, without a device sync. `reference` is the definition in plain torch; the other backends
equal it and are faster. The backend is picked here, by device and by what a tensor is.
"""
