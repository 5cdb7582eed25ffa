# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter computes bfloat16 on its bit patterns: `install` mends that, for tests without a GPU.

With it, bfloat16 arithmetic, comparisons and conversions are those of `ml_dtypes` (round to nearest even), and a dot
of 16-bit blocks multiplies and adds in float32, as tensor cores do. Programs still run one after another, so no race
shows; shared memory, registers and TF32 are not modelled.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as _interpreter

_installed = False


def install() -> None:
    """Mend the interpreter of this process, once, before the first launch."""
    global _installed
    if _installed:
        return
    _installed = True
    import ml_dtypes

    bf16 = np.dtype(ml_dtypes.bfloat16)
    floats = {tl.float32: np.dtype(np.float32), tl.float16: np.dtype(np.float16), tl.float64: np.dtype(np.float64),
              tl.bfloat16: bf16}  # fmt: skip
    numpy_type, convert = _interpreter._get_np_dtype, _interpreter._convert_float
    builder = _interpreter.InterpreterBuilder
    dot, patch = builder.create_dot, _interpreter._patch_lang_tensor

    def get_np_dtype(ty):
        element = getattr(ty, "element_ty", None)
        pointer = isinstance(ty, tl.pointer_type) or isinstance(element, tl.pointer_type)
        return bf16 if not pointer and getattr(ty, "scalar", ty) == tl.bfloat16 else numpy_type(ty)

    def convert_float(data, source, target, mode):
        if source in floats and target in floats:
            with np.errstate(over="ignore", invalid="ignore"):
                out = data.view(floats[source]).astype(floats[target])
            return np.ascontiguousarray(out).view(f"uint{target.primitive_bitwidth}").reshape(data.shape)
        return convert(data, source, target, mode)

    def wide(handle):
        if handle.dtype.scalar in (tl.bfloat16, tl.float16):
            return _interpreter.TensorHandle(handle.data.astype(np.float32), tl.float32)
        return handle

    def create_dot(self, a, b, d, *rest):
        with np.errstate(over="ignore", invalid="ignore"):
            return dot(self, wide(a), wide(b), d, *rest)

    def patch_lang_tensor(tensor, *scope):  # triton 3.6 with numpy >= 2.4: a one-element block as the end of a range
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])

    _interpreter._get_np_dtype, _interpreter._convert_float = get_np_dtype, convert_float
    _interpreter._patch_lang_tensor = patch_lang_tensor
    builder.create_dot = create_dot
    _interpreter._patch_lang = _patched_once(_interpreter._patch_lang)
    if not hasattr(builder, "get_bf16"):
        builder.get_bf16 = lambda self, value: _interpreter.TensorHandle(np.array([value], dtype=bf16), tl.bfloat16)


class _Nothing:
    def restore(self) -> None:
        pass


def _patched_once(patch_lang):
    """The interpreter puts its own functions in the place of Triton's at every call of every function, `tl.sum` among
    them, and that takes most of its time. Once a launch is enough."""
    patched: set[int] = set()

    def once(fn):
        languages = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if languages <= patched:
            return _Nothing()
        scope = patch_lang(fn)
        new = languages - patched
        patched.update(new)
        restore = scope.restore

        def restored() -> None:
            patched.difference_update(new)
            restore()

        scope.restore = restored
        return scope

    return once
