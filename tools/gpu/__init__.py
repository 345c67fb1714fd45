"""The parts of tools/gpu_check.py: a module each, whose `run(report)` measures something and reports it."""
