"""Drafters: what a kind is, how it is trained, how it drafts, and the checkpoint that holds it."""
