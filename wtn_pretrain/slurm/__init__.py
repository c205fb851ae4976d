"""Submitting runs to Slurm: batch scripts filled in from a run's configuration, and what becomes of the jobs."""
