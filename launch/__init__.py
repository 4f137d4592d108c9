"""The commands: the only code that reads argv, the environment or YAML, or that starts process groups."""
