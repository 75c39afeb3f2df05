"""Loops in C: compiled when the package is built, loaded when they are first called."""
