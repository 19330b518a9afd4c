"""From a response to a number: grading rules, killable workers, reward shaping. No torch on import."""
