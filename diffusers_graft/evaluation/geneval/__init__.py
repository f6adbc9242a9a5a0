"""GenEval: prompts, rules, and the networks that look at pictures. Paper: arXiv 2310.11513."""
