"""Triton's interpreter in tests: what it gets wrong, put right.

It runs where TRITON_INTERPRET=1, which holds for a whole process: `make test` starts one for it.
There the tests of implementation="triton" run on the CPU, and no others; see tests/conftest.py.
"""

import contextlib
import dataclasses
import math
import os

import ml_dtypes
import numpy as np

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@contextlib.contextmanager
def interpreting():
    """The context of small calls, as `jla.pallas.interpret` is of Mosaic's kernels."""
    assert INTERPRETED, "Triton's interpreter needs a process with TRITON_INTERPRET=1"
    yield


def repair():
    """From now on bfloat16 is rounded and multiplied as on a GPU, and so is TF32.

    By itself the interpreter keeps bfloat16 as integers: it cuts off where a GPU rounds to the
    nearest, and computes with the integers. Of float32, `tl.dot` with input_precision "tf32" has
    all digits, and "bf16x3" is refused; "tf32x3" has the product of what TF32 cuts off of both
    operands, which a GPU leaves out.
    """
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast, convert = builder.cast_impl, builder.create_fp_to_fp
    binary, unary, dot = builder.binary_op, builder.unary_op, builder.create_dot
    handle = interpreter.TensorHandle
    accepted = *interpreter.interpreter_builder.options.allowed_dot_input_precisions, "bf16x3"
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, allowed_dot_input_precisions=accepted
    )

    def is_bfloat16(x):
        return x.dtype.scalar == tl.bfloat16

    def numbers(x):
        """The values of a handle, where NumPy would see bits."""
        return x.data.view(ml_dtypes.bfloat16) if is_bfloat16(x) else x.data

    def bits(data):
        return data.view(np.uint16) if data.dtype == ml_dtypes.bfloat16 else data

    def cast_impl(self, x, to):
        if is_bfloat16(x) or to.scalar == tl.bfloat16:
            of = ml_dtypes.bfloat16 if to.scalar == tl.bfloat16 else interpreter._get_np_dtype(to)
            return handle(bits(numbers(x).astype(of)), to.scalar)
        return cast(self, x, to)

    def create_fp_to_fp(self, x, to, rounding):
        if is_bfloat16(x) or to.scalar == tl.bfloat16:
            return cast_impl(self, x, to)
        return convert(self, x, to, rounding)

    def binary_op(self, x, y, operation):
        if is_bfloat16(x) and is_bfloat16(y):
            return handle(bits(operation(numbers(x), numbers(y))), x.dtype.scalar)
        return binary(self, x, y, operation)

    def unary_op(self, x, operation):
        if is_bfloat16(x):
            return handle(bits(operation(numbers(x))), x.dtype.scalar)
        return unary(self, x, operation)

    def create_dot(self, x, y, start, precision, most_imprecise):
        of = [numbers(operand).astype(np.float32) for operand in (x, y)]
        if x.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32:
            of = [_tf32(operand) for operand in of]
        if start.dtype.scalar != tl.float32:
            return dot(self, x, y, start, precision, most_imprecise)
        if x.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.BF16x3:
            (a, a_low), (b, b_low) = map(_two_bfloat16, of)
            return handle(a_low @ b + a @ b_low + a @ b + start.data, tl.float32)
        products = np.matmul(*of)
        if x.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32x3:
            products -= np.matmul(*(operand - _tf32(operand) for operand in of))
        return handle(products + start.data, tl.float32)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    builder.binary_op, builder.unary_op, builder.create_dot = binary_op, unary_op, create_dot


def hasten():
    """The same in half the time."""
    from triton.runtime import interpreter

    # Every sum and product of integers is made once more in 64 bits, to see an overflow; at the
    # tests' sizes there is none.
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options

    # `tl` is changed anew for every call of a function inside a kernel, `tl.sum` included: once for
    # each of the modules that call it is enough, for that is what the change depends on.
    patch, run, changed = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(function):
        module = id(function.__globals__)
        if module not in changed:
            changed.add(module)
            return patch(function)
        return None

    def run_grid(self, *args, **constants):
        changed.clear()
        return run(self, *args, **constants)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, run_grid
    _remember_types()


def _remember_types():
    """Types and shapes are made once: every operation would make its result's anew, with a name
    that nothing reads, which takes longer than the operation on a small array."""
    from triton.language import core
    from triton.runtime import interpreter

    make_type, of_numpy = core.block_type.__init__, interpreter._get_np_dtype
    compare = core.tuple.__eq__
    # By numbers: a block's shape and size, then a tensor's. `sizes` of `shape` has a block's shape.
    shapes, known = {}, {}

    def init_block(self, element_ty, shape):
        found = known.get(id(shape))
        if found is None:
            numbers = (*core._unwrap_shape(shape),)
            found = shapes.get(numbers)
            if found is None:
                make_type(self, element_ty, shape)  # which looks whether there can be one
                constants = core.tuple([core.constexpr(n) for n in numbers])
                found = self.shape, self.numel, constants, core.constexpr(math.prod(numbers))
                shapes[numbers] = known[id(self.shape)] = found
        self.element_ty, (self.shape, self.numel, *_) = element_ty, found

    def init_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        if type.is_block():
            *_, self.shape, self.numel = known[id(type.shape)]
        else:
            self.shape, self.numel = core.tuple([]), core.constexpr(1)

    def equal(self, other):
        return core.constexpr(True) if other is self else compare(self, other)

    def ignored(self, name):
        """It is made where it is read."""

    def numpy_dtype(x):
        try:
            return x.of_numpy
        except AttributeError:
            x.of_numpy = of_numpy(x)
            return x.of_numpy

    core.block_type.__init__, core.tensor.__init__ = init_block, init_tensor
    core.tuple.__eq__ = equal
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>", ignored)
    interpreter._get_np_dtype = numpy_dtype


def _two_bfloat16(x):
    """float32 numbers as the two of bfloat16 whose sum they nearly are."""
    high = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    return high, (x - high).astype(ml_dtypes.bfloat16).astype(np.float32)


def _tf32(x):
    """float32 with the ten bits of mantissa that TF32 has, to the nearest."""
    return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
