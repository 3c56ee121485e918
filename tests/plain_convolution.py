"""A convolution by numpy loops, to compare with."""

import numpy as np


def conv_loops(x, kernel, stride, groups, pads):
    """Convolution in float64: a loop over groups and kernel positions."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *pads, (0, 0)))
    kh, kw, inner, d = kernel.shape
    h, w = (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1
    out = np.zeros((x.shape[0], h, w, d))
    each = d // groups
    for g in range(groups):
        for i in range(kh):
            for j in range(kw):
                part = x[:, i : i + stride * h : stride, j : j + stride * w : stride, g * inner : (g + 1) * inner]
                out[..., g * each : (g + 1) * each] += part @ kernel[i, j, :, g * each : (g + 1) * each]
    return out
