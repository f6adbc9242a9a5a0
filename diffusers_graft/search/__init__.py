"""The best plan under a budget: measured choices and the solver."""
