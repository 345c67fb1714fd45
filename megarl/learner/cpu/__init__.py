"""What Megatron-Core needs to run without a GPU: a device layer and a layer spec."""
