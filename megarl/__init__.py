"""megarl: Megatron-based reinforcement learning for LLM reasoning with verifiable rewards."""

import os
import sys

if sys.argv[:1] == ["-m"] and sys.path[0] == os.getcwd() and not sys.flags.safe_path:
    sys.path.append(sys.path.pop(0))  # `python -m megarl.cli`: a file queue.py here mustn't replace Python's own
