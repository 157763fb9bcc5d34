"""Policy and reference, adapters, one forward for prompts and the rows that share them."""
