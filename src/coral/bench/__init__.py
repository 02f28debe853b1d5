"""Measure: the same prompts through plain decoding, drafters and peers, with equality of output checked."""
