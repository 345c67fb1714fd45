"""Algorithms as recipes of orthogonal fields; pure torch, no Megatron, no GPU."""
