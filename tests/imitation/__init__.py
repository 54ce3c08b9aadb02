"""x"""

from imitation.gpu import imitated_gpu

__all__ = ["imitated_gpu"]
