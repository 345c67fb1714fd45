"""`megarl prepare-data`, as a file."""

from megarl.tools.prepare_data import main

if __name__ == "__main__":
    main()
