"""Data sets to prompts: fetched, cleaned, kept apart from what is evaluated on, and written with an account of it."""
