"""Training: recipe -> optimizer, one step, the loop over chunks of steps, checkpoints."""
