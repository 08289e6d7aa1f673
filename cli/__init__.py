"""The command line: options and output; everything else is in ``greedy``, for Python users too."""
