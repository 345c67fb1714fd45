"""One op, one name: each in plain torch, which is also the CPU path."""
