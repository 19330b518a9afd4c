"""The policy on Megatron-core: topology, model, log-probs, updates."""

import warnings

# Apex is optional everywhere and Transformer Engine on CPU: nothing to warn about, on every rank, at every import.
warnings.filterwarnings("ignore", message=r"(Transformer Engine and )?Apex (is|are) not installed")
