"""The loop, the recipes and what they are made of."""
