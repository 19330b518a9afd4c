"""Proof, on the user's own settings, that the gradient does not depend on the layout of ranks.

A miniature of the model is trained for a few mini-batches by the real actor (Megatron's layers, schedules, DDP,
`finalize_model_grads` and optimizer) in one layout after the other, and every gradient is compared with the one that
Hugging Face's model gives in float64, one sequence at a time, by the plain formulas.

    layouts     the standard layouts, and the configuration's own
    miniature   the small model and its mini-batches
    reference   the float64 gradients, without Megatron and without packing
    rank        what a rank does in one layout
    pool        the processes that are the ranks
    report      the table
"""
