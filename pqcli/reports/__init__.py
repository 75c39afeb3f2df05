"""What a compression cost, as data."""
