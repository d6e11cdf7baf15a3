"""The losses, the loop, checkpoints, and whether a training is healthy."""
