"""Rollout: vLLM engines in processes of their own, and the weights they serve."""
