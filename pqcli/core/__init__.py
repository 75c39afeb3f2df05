"""The pure heart: mathematics on tensors. Touches no files, terminals, clocks or global random state."""
