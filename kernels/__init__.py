"""Device code: one file per kernel, its plain reference in a ``reference_*`` beside it. No policy, no I/O."""
