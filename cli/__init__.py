"""The command line: what people see and type, and nothing a Python user would miss."""
