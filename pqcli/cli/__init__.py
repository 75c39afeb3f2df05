"""The command line: what is typed and what is seen; all in here ends at a terminal, a page or a JSON document."""
