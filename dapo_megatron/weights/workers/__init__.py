"""One module for each kind of engine: what takes the weights inside its processes. The trainer imports none."""
