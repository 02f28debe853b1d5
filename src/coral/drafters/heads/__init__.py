"""LM heads of a drafter that read fewer rows than the target's."""
