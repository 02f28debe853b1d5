"""Many texts at once: an engine over `decoding.cycle`, and a server that speaks OpenAI's protocol."""
