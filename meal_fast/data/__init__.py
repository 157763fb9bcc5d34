"""Prompts, preferences, objectives, reward statistics, toy worlds, packaged assets."""
