"""The policy on Megatron-core: topology, model, log-probs, optimizer steps."""
