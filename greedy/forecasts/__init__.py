"""Forecasts of the memory, disk and time of a run, and measurements of a machine."""
