"""One module for each kind of engine whose server takes endpoints of ours. They run in the engine's process."""
