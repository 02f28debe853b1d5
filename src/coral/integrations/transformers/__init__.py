"""Behind `generate` of transformers."""
