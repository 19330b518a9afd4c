"""What the base model is made from. The quick-start looks here whether its cached base still fits."""

TRAIN_PROBLEMS = 8192
HELD_OUT_PROBLEMS = 512

GUESSES = 0.6
"""Share of demonstrations that guess at once."""
GUESS_ERROR = 3
"""Guesses are off by up to this much either way, evenly: right one time in seven."""
SLIPS = 0.06
"""Share of the steps of worked demonstrations that go wrong."""

STEPS = 900
BATCH = 128
"""Demonstrations per step."""
RATE = 2e-3
WARMUP = 50

RECIPE = {
    "steps": STEPS,
    "batch": BATCH,
    "rate": RATE,
    "warmup": WARMUP,
    "problems": [TRAIN_PROBLEMS, HELD_OUT_PROBLEMS],
    "guesses": GUESSES,
    "guess_error": GUESS_ERROR,
    "slips": SLIPS,
}
