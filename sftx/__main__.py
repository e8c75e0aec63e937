"""`python -m sftx` is the command `sftx`."""

from sftx.cli import main

if __name__ == "__main__":
    main()
