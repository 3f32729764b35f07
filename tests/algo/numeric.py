"""Gradients by central differences in float64: the reference that shares nothing with jax."""

import numpy as np


def numeric_gradient(function, point, step=1e-5):
    point = np.asarray(point, np.float64)
    gradient = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        moved = np.stack([point, point])
        moved[(0, *index)] += step
        moved[(1, *index)] -= step
        gradient[index] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return gradient
