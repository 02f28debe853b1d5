"""Drafters of the target's features: EAGLE-1, EAGLE-2, HASS and CORAL."""
