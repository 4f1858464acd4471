"""From a configuration to a trained model.

loop          `train_and_evaluate`, and the loop over updates
setup         what it works on: model, mesh, shardings, splits
step          one update: the train step and its state; optimizer: optimisers and learning rates
loss          the loss of a batch, window by window; cross_entropy: over a large vocabulary
evaluation    the loss of a split
callbacks     what happens between updates; metrics: where figures go; console: what the user is told; wandb
saving        writes checkpoints while a run trains; checkpoint: their form on the disk, verified and read
workdir       the run's directory: its lock, its configuration, where it started from
check         what a run would take; conversion: published weights
"""
