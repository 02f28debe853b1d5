"""CORAL inside other programs."""
