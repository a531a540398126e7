"""What is on disk of a run, and whether a run may go on from it: folder, checkpoints, metrics, identity."""
