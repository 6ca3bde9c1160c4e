"""``python -m merge_search``."""

from merge_search.cli import main

if __name__ == "__main__":
    main()
