"""Recorded forwards for a GPU. No GPU has run them yet: benchmarks/gpu.py is to be run first."""
