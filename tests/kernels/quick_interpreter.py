"""Makes Triton's interpreter faster, with the same results: it spends most of its time on its own bookkeeping.

Each patch keeps what Triton computes anew at every operation although it depends on a shape, a dtype or a function
alone. Nothing that a kernel computes is touched.
"""

from __future__ import annotations

import functools

import triton.language as tl
from triton.language import core, semantic
from triton.runtime import interpreter


def patch() -> None:
    """For all launches of this process from here on."""
    _language_once_a_launch()
    _shapes_once()
    _dtypes_once()
    _no_unused_overflow()


def _language_once_a_launch() -> None:
    """Triton replaces the functions of its language at every call of a function inside a kernel.

    Once a launch is enough, for each of the two modules that a function may have the language from.
    """
    patch, patched = interpreter._patch_lang, set()

    @functools.cache
    def languages_of(function):
        return {module.__name__ for module in function.__globals__.values() if module is tl or module is core}

    def once(function):
        languages = languages_of(function)
        if languages <= patched:
            return None
        scope = patch(function)
        if not patched:  # a launch: all others are inside of one

            def restore(before=scope.restore):
                patched.clear()
                before()

            scope.restore = restore
        patched.update(languages)
        return scope

    interpreter._patch_lang = once


def _shapes_once() -> None:
    """Triton checks the shape of every block's type and wraps it for every tensor, number by number."""
    of_type, unwrap = core.block_type.__init__, core._unwrap_if_constexpr
    known = {}  # by shape: those of a type and of a tensor, numbers of elements likewise, and the shape's name
    none = core.constexpr(1), core.tuple([])
    plain = {int, float, bool, str, type(None), core.tensor, core.dtype, core.block_type, core.pointer_type}

    def block_type(self, element_ty, shape):
        sizes = tuple([size.value if type(size) is core.constexpr else size for size in shape])
        if sizes not in known:
            of_type(self, element_ty, shape)
            wrapped = core.constexpr(self.numel), core.tuple([core.constexpr(size) for size in self.shape])
            known[sizes] = self.shape, self.numel, str(self.shape), wrapped
        self.element_ty = element_ty
        self.shape, self.numel, name, self._of_tensor = known[sizes]
        self.name = f"<{name}, {element_ty}>"

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type._of_tensor if type.is_block() else none

    def unwrapped(value):
        kind = type(value)
        if kind is core.constexpr:
            return value.value
        return value if kind in plain else unwrap(value)

    core.block_type.__init__, core.tensor.__init__, core._unwrap_if_constexpr = block_type, tensor, unwrapped


def _dtypes_once() -> None:
    """Triton writes its table of NumPy's dtypes down at every look-up."""
    look_up, known = interpreter._get_np_dtype, {}

    def dtype(kind):
        scalar = kind.scalar
        if scalar.name not in known:
            known[scalar.name] = look_up(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = dtype


def _no_unused_overflow() -> None:
    """Triton computes whether each sum of integers overflows, and uses that only when it debugs."""
    compute = semantic.TritonSemantic.binary_op_sanitize_overflow_impl

    def if_used(self, *operation):
        if self.builder.options.debug:
            compute(self, *operation)

    semantic.TritonSemantic.binary_op_sanitize_overflow_impl = if_used
