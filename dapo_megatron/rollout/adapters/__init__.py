"""One module for each kind of engine: `engine.kind` names the module, whose `Adapter` is an `adapter.EngineAdapter`."""
