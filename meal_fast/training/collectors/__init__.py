"""Where an update's responses come from: plain samples, Meal's kept ones, RiC's relabelled ones."""

__all__: list[str] = []
