"""Recipes: a whole run in one YAML file, from the model and its data to a measured, shared graft."""
