"""From a response to a number: grading rules, killable workers, reward shaping. Nothing here imports torch on import."""
