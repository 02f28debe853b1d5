"""Drafters on the Hugging Face hub, and the card that describes them."""
