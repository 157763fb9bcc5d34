"""A run behind a local address: a playground for people, an API for OpenAI's clients."""
