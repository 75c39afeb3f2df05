"""How many bytes: what a survey finds, budgets, and the choice of a codec for each tensor."""
