"""Measures of generated images and of CLIP, on features that the caller brings."""
