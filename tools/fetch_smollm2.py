"""`megarl fetch-smollm2`, as a file."""

from megarl.tools.fetch_smollm2 import main

if __name__ == "__main__":
    main()
