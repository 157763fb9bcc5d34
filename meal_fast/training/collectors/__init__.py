"""Where an update's responses come from."""
