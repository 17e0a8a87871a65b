"""Files: weights (`safetensors`), model folders (`folder`), training checkpoints (`checkpoint`)."""
