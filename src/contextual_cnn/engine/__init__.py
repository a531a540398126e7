"""The loop: train, evaluate, save, log."""
