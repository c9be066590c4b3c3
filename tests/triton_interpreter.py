"""What triton's interpreter lacks to run Liger's norm on a CPU; only to be imported where triton is installed.

The compiler passes a float as a float32 scalar and links CUDA's libdevice; the interpreter passes Python's number and
has no libdevice. (It multiplies two bfloat16 numbers as integers, too, so half precision is float16 here.)
"""

from __future__ import annotations

import liger_kernel.ops.rms_norm
import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter


@triton.jit
def rsqrt(x):
    return tl.rsqrt(x)


def complete(monkeypatch):
    """Give the interpreter float32 scalars and a reciprocal root."""
    convert = interpreter._implicit_cvt

    def convert_floats_too(argument):
        if not isinstance(argument, float):
            return convert(argument)
        return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert_floats_too)
    monkeypatch.setattr(liger_kernel.ops.rms_norm, "rsqrt", rsqrt)
