"""Everything that knows Lightning: the module, the Trainer, checkpoints, loggers, callbacks and strategies."""
