"""Extra passes over a model on demand: each answers one question and leaves no trace."""
