"""Device code: one file per kernel, its reference in :mod:`cachemoe.kernels.reference`. No policy, no I/O."""
