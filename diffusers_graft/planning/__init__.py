"""Rules and the plans they resolve to."""
