"""From a name to a language model: where its files are, how it is loaded, what it computes."""
