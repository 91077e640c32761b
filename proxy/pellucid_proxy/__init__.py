"""Pellucid's data path on one node: kernel rules, workers, the agent that feeds them."""

__version__ = "0.1.0"
