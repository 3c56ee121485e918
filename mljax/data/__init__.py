"""Data sets, one file each, and the pipeline from files to batches. Knows nothing of systems."""
