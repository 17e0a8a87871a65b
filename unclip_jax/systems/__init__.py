"""Compositions of stages, without maths of their own: `unclip`, from a caption to a picture."""
