"""One page of a run, which opens from disk without a network."""
