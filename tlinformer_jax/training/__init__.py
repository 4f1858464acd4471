"""Training: loss, optimiser, step, loop, metrics and checkpoints."""
