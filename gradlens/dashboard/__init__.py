"""The TensorBoard tab **GradLens**: run directories under the log directory, as a person looks at them.

    catalog        which runs there are, and whether a name may be served
    downsampling   a million steps as some hundred columns, in which no spike vanishes
    maps           layer by step matrices, scanned a piece at a time
    views          what each page asks: the questions of `open_run`, as numbers and words
    memory         what was freed goes back to the system
    wire           an answer as bytes: JSON, or a header and arrays
    plugin         the routes, for TensorBoard
    static/        the pages: hand-written ES modules, no build step

No module computes a statistic of its own, and none imports torch.
"""
