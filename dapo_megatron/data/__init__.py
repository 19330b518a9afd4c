"""Where prompts come from: files and the hub, a template, a tokenizer, and a shuffled stream with a saved cursor."""
