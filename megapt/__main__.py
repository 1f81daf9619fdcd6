"""`python -m megapt`: the same commands as `megapt`."""

from megapt.cli import main

if __name__ == "__main__":
    main()
