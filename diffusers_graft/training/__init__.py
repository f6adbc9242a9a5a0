"""Stage one (activation distillation) and stage two (light finetuning)."""
