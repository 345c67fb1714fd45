"""megarl: Megatron-based reinforcement learning for LLM reasoning with verifiable rewards."""
