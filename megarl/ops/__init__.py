"""One op, one name: in plain torch (`reference.py`), which is also the CPU path, and in Triton (`kernels.py`)."""
