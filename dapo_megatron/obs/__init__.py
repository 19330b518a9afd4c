"""What a person sees of a run: its folder, metrics, responses, and a display that follows it. No torch on import."""
