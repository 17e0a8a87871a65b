"""Measures of generated images, on features that the caller brings."""
