"""Real images and text as micro-batches: a pure function of (seed, step), whatever the rank count and workers."""
