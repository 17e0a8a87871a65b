"""The page of `unclip-jax demo`: Gradio is only needed, and only imported, by `page`."""
