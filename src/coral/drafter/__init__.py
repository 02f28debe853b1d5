"""The drafter: a small network that predicts the next feature, its heads and its checkpoint."""
