"""The networks: one decoder for every family, heads on it, LoRA. Flax stays inside; outside are functions of arrays."""
