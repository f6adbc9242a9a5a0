"""Stage two: finetuning of the whole model."""
