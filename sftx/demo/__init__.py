"""The task that ships with sftx: everyday requests as function calls, with its data and its run file."""
