"""The training of a stage, or of all at once: its choices, epochs, checkpoints and end."""
