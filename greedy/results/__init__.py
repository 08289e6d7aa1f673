"""Uses of a trained network: evaluation, prediction, export, curves and figures."""
