"""Command lines: thin shells over the package. Nothing heavy is imported before it is needed."""
