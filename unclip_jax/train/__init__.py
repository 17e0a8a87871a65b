"""Training: the state and its updates (`state`), and what a run writes down (`log`).

Beside them: gradients of batches that memory does not hold (`gradient_cache`), sharpness-aware ones
(`sam`), adapters (`lora`), and the paper's settings (`presets`).
"""
