"""A run's configuration, its checkpoints on disk, what it reports, and how it is opened."""
