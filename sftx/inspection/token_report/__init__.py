"""`sftx inspect`: the tokens of a run's rows, each with its label and the reason for it.

The report is shown on the terminal (`terminal`), as an HTML page (`token_page`) or as JSON. It may import the data,
model and assembly packages, `dataset_view` and `dataset_statistics`; it reads no weights.
"""
