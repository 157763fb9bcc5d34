"""Raised when the code that makes a part changes what it makes: older caches are then rebuilt."""

SMOLLM2 = 1
PROMPTS = 1
REWARD_MODELS = 1
