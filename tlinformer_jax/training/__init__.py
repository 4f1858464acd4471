"""From a configuration to a trained model.

loop          `train_and_evaluate`, and the loop over updates
setup         the fixed parts of a run: model, mesh, shardings, splits
step          one update: the train step and its state; optimizer: optimisers and learning rates
loss          the loss of a batch; window_loss: of a long sequence, window by window
evaluation    the loss of a split
callbacks     actions between updates; metrics: where figures go; console: messages to the user; wandb: Weights & Biases
saving        writes checkpoints during a run; checkpoint: their files, verified and read
workdir       the run's directory: its lock, configuration and origin
check         what a run needs; device_memory: what it takes on a device; conversion: published weights
"""
