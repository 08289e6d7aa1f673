"""One optimiser step of a stage, in the memory that there is."""
