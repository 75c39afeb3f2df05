"""The journal of a long run: what its tasks have found, in a file beside the output, until that is in its place.

A run that is killed leaves its journal; the same command finds in it what was done and goes on from there.
"""
