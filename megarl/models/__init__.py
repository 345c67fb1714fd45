"""Model families: what a Hugging Face configuration means to Megatron, and the table of its weights."""
