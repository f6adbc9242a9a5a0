"""Model cards: the edits, the training and the scores of a graft, as Markdown."""
