"""Prompts of the benchmark suites."""
