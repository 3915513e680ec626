"""Patchmill's trainer: methods, data loading, engines, checkpoints, tracking and evaluation."""

__version__ = "0.1.0"
