"""Conversations in, training examples out; nothing here knows of training or decoding."""
