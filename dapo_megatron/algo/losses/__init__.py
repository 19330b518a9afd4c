"""The losses that `algo.loss` knows by name, one a file. `algo.loss=some.module:NAME` takes one from elsewhere."""
