"""The target: a frozen Hugging Face LLM, where it comes from, and how its rows are computed."""
