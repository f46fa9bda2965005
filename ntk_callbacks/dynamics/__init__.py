"""What a kernel predicts of training."""

from ntk_callbacks.dynamics.stability import max_learning_rate

__all__ = ["max_learning_rate"]
