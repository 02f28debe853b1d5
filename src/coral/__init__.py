"""CORAL: lossless acceleration of Hugging Face LLMs."""
