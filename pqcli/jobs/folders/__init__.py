"""The verbs on folders: each component of one goes through what a single file does; the rest is copied."""
