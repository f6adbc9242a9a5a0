"""Stage one: activation distillation."""
