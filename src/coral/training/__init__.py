"""Training: unroll the drafter over its own outputs, compare with the target, update."""
