"""From a model and examples to trained weights: the loop and what it stands on."""
