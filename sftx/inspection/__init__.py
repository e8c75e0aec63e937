"""What a run would train on, and what is wrong with it, shown before any training: `sftx inspect`, `sftx doctor`."""
