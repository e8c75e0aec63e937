"""`sftx doctor`: checks of a run's rows, template, tokenizer and model, made before training.

It may import the data, model and assembly packages, `dataset_view` and `dataset_statistics`; it reads no weights.
"""
