"""Figures of the paper, a script each: `python -m experiments.figures` draws them all."""
