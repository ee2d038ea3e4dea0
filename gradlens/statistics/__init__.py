"""What rows mean: from the kernels' numbers to a snapshot, and the buffers and evidence that need more than one look."""
