"""meal-fast: train one language model that its user steers between objectives by a preference w."""

__version__ = "0.1.0"
