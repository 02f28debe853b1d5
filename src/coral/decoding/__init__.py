"""Decoding: propose a draft tree, verify it with the target, keep the accepted path."""
