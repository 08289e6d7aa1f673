"""The device memory that a training step takes, counted before it runs."""
