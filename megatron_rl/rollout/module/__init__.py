"""Generation by a module of `transformers`, for models that have no family here."""
