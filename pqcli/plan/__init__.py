"""What will be done to each tensor, and why, before any weight is read."""
