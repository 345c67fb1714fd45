"""`megarl convert`, as a file."""

from megarl.tools.convert_checkpoint import main

if __name__ == "__main__":  # Megatron may start processes that import this file
    main()
