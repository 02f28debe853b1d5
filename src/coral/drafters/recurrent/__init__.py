"""What kinds share whose draft steps read what the step before made: layers, unroll, losses and tree."""
