"""Training: schedules, processes, checkpoints, one flat loop."""
