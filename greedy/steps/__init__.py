"""The optimiser step of a stage, within the available memory."""
