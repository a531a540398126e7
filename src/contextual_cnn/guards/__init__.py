"""What watches a run: requests to stop, hangs, memory, numbers that are not finite, waits for data."""
