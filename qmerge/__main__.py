"""``python -m qmerge``."""

from qmerge.cli.main import main

if __name__ == "__main__":
    main()
