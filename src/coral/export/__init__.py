"""Drafters in the formats that other engines load: written by `coral export`, read by `coral import`."""
