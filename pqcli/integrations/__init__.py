"""Other people's libraries, imported only when they are asked for: models that transformers runs."""
