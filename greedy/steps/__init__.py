"""One optimiser step of a stage, in as little memory as there is."""
