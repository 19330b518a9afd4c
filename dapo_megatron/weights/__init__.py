"""Policy weights on their way: Hugging Face checkpoints, and transports to the engines."""
