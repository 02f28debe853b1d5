"""The drafter: a network of one decoder layer, and the directory it is stored in."""
