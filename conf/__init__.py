"""Hydra configuration: primary files named after the commands, and the group ``model``."""
