"""The run directory: written by one process a rank, read by anyone, without torch."""
