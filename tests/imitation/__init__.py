"""A GPU that is not there: what a test marked ``gpu`` runs on where there is none. See ``gpu``."""

from imitation.gpu import imitated_gpu

__all__ = ["imitated_gpu"]
