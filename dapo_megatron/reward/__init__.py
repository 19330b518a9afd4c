"""This package turns a response into a number: rules, killable workers, shaping. It imports no torch."""
