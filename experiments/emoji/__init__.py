"""Captioned emoji: the data set, and the training of every stage on it."""
