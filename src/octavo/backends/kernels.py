"""The loops of ``rounding.cpp`` for Triton. Imported by the backend that runs them, where Triton is installed.

No multiplication may be fused with an addition here, and divisions are rounded as IEEE 754 says: launch with
``enable_fp_fusion=False``.
"""
# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"

import triton
import triton.language as tl

INTEGERS, SHIFTED_INTEGERS, SMALL_FLOATS, CODEBOOK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

AMAX, POWER_FLOOR, POWER_CEIL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_SIGN = tl.constexpr(-0x80000000)
_EXPONENT = tl.constexpr(0x7F800000)
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no room for a fraction
_FAR = tl.constexpr(1048576.0)  # outside of any code, and small enough for the magic number


@triton.jit
def _clamped(y, LOW, HIGH):
    """NaN stays."""
    y = tl.where(y < LOW, LOW, y)
    return tl.where(y > HIGH, HIGH, y)


@triton.jit
def _whole(y):
    return (y + _MAGIC) - _MAGIC


@triton.jit
def _small_float(y, LOW, HIGH, MIN_NORMAL, FACTOR):
    """In the binade of ``magic`` one unit in the last place is the distance between two neighbours of the format."""
    y = _clamped(y, LOW, HIGH)
    bits = y.to(tl.int32, bitcast=True)
    power = (bits & _EXPONENT).to(tl.float32, bitcast=True)
    magic = tl.where(power < MIN_NORMAL, MIN_NORMAL, power) * FACTOR
    rounded = ((y + magic) - magic).to(tl.int32, bitcast=True)
    return ((rounded & _MAGNITUDE) | (bits & _SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def _nearest_entry(y, thresholds, NUM_VALUES: tl.constexpr):
    found = tl.zeros_like(y).to(tl.int32)
    for i in tl.static_range(NUM_VALUES - 1):
        found = tl.where(y > tl.load(thresholds + i), i + 1, found)
    return found


@triton.jit
def _float_code(y, MIN_NORMAL, SUBNORMALS, SHIFT, REBIAS, NAN_CODE, SIGN_SHIFT):
    """Of a value of the format, in its bit pattern."""
    bits = y.to(tl.int32, bitcast=True)
    magnitude = bits & _MAGNITUDE
    size = magnitude.to(tl.float32, bitcast=True)
    # Below the normal numbers the code counts the smallest ones; the cast is not asked about anything else.
    subnormal = (tl.where(size < MIN_NORMAL, size, 0.0) * SUBNORMALS).to(tl.int32)
    code = tl.where(size < MIN_NORMAL, subnormal, (magnitude >> SHIFT) - REBIAS)
    if NAN_CODE >= 0:
        code = tl.where(magnitude > _EXPONENT, NAN_CODE, code)
    return code | tl.where(bits < 0, 1 << SIGN_SHIFT, 0)


@triton.jit
def round_rows(
    x, out, scales, zeros, values, thresholds,  # pointers
    num_values, width, matrix_rows, tile_rows, num_groups,
    SIZE: tl.constexpr,  # of a group; 0: a row is one
    KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, UNIT: tl.constexpr,
    MIN_NORMAL: tl.constexpr, FACTOR: tl.constexpr, SUBNORMALS: tl.constexpr,
    SHIFT: tl.constexpr, REBIAS: tl.constexpr, NAN_CODE: tl.constexpr, SIGN_SHIFT: tl.constexpr,
    NUM_VALUES: tl.constexpr, AS_CODES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of ``Blocks``, or a piece of it: values on the grid, or their codes."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row * width + column
    inside = (column < width) & (at < num_values)
    per_matrix = (matrix_rows + tile_rows - 1) // tile_rows
    scale_at = (row // matrix_rows * per_matrix + row % matrix_rows // tile_rows) * num_groups
    if SIZE > 0:
        scale_at = scale_at + column // SIZE
        scale = tl.load(scales + scale_at, mask=inside, other=1.0)
    else:
        scale = tl.load(scales + scale_at)
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.div_rn(y, tl.where(scale == 0.0, 1.0, scale) + tl.zeros_like(y))
    if KIND == INTEGERS:
        whole = _whole(_clamped(y * (1.0 / UNIT), LOW / UNIT, HIGH / UNIT))
        if AS_CODES:
            tl.store(out + at, whole.to(tl.int32).to(out.dtype.element_ty), mask=inside)
        else:
            tl.store(out + at, (whole * UNIT * scale).to(out.dtype.element_ty), mask=inside)
    elif KIND == SHIFTED_INTEGERS:
        if SIZE > 0:
            zero = tl.load(zeros + scale_at, mask=inside, other=0.0)
        else:
            zero = tl.load(zeros + scale_at)
        whole = _clamped(_whole(_clamped(y, -_FAR, _FAR)) + zero, LOW, HIGH)
        if AS_CODES:
            tl.store(out + at, whole.to(tl.int32).to(out.dtype.element_ty), mask=inside)
        else:
            tl.store(out + at, ((whole - zero) * scale).to(out.dtype.element_ty), mask=inside)
    elif KIND == SMALL_FLOATS:
        rounded = _small_float(y, LOW, HIGH, MIN_NORMAL, FACTOR)
        if AS_CODES:
            code = _float_code(rounded, MIN_NORMAL, SUBNORMALS, SHIFT, REBIAS, NAN_CODE, SIGN_SHIFT)
            tl.store(out + at, code.to(out.dtype.element_ty), mask=inside)
        else:
            tl.store(out + at, (rounded * scale).to(out.dtype.element_ty), mask=inside)
    else:
        entry = _nearest_entry(y, thresholds, NUM_VALUES)
        if AS_CODES:
            entry = tl.where(y == y, entry, NUM_VALUES - 1)
            tl.store(out + at, entry.to(out.dtype.element_ty), mask=inside)
        else:
            found = tl.where(y == y, tl.load(values + entry), y)
            tl.store(out + at, (found * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _power(amax, TOP_EXPONENT, TOP_MANTISSA, IS_CEIL):
    """2 to what the exponents of ``amax`` and of the largest value differ by, as IEEE 754 writes it."""
    bits = amax.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) & 0xFF) - 127 - TOP_EXPONENT
    if IS_CEIL:
        exponent += ((bits & 0x7FFFFF) > TOP_MANTISSA).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, -127), 127)
    return tl.where(exponent == -127, 0x00400000, (exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scales_of_groups(
    x, out, outer, num_values, SIZE: tl.constexpr,
    RULE: tl.constexpr, TOP: tl.constexpr, TOP_EXPONENT: tl.constexpr, TOP_MANTISSA: tl.constexpr,
    SMALLEST: tl.constexpr, MIN_SCALE: tl.constexpr, EMPTY: tl.constexpr, IS_NESTED: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, MIN_NORMAL: tl.constexpr, FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The scale that covers every ``SIZE`` neighbours, on the grid of its own format."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    y = tl.load(x + at, mask=at < num_values, other=0.0).to(tl.float32)
    magnitudes = tl.reshape(y.to(tl.int32, bitcast=True) & _MAGNITUDE, (BLOCK // SIZE, SIZE))
    largest = tl.max(magnitudes, axis=1)
    amax = largest.to(tl.float32, bitcast=True)
    if RULE == AMAX:
        scale = tl.div_rn(amax, tl.zeros_like(amax) + TOP)
    else:
        scale = _power(amax, TOP_EXPONENT, TOP_MANTISSA, RULE == POWER_CEIL)
    scale = tl.where(scale < MIN_SCALE, MIN_SCALE, scale)
    scale = tl.where((amax == 0.0) | (scale == 0.0), EMPTY, scale)
    if IS_NESTED:
        size = tl.load(outer)
        least = tl.abs(size) * SMALLEST
        scale = tl.where(scale < least, least, scale)
        scale = tl.div_rn(scale, tl.zeros_like(scale) + tl.where(size == 0.0, 1.0, size))
        scale = _small_float(scale, LOW, HIGH, MIN_NORMAL, FACTOR) * size
    scale = tl.where(largest >= _EXPONENT, float("nan"), scale)
    group = first // SIZE + tl.arange(0, BLOCK // SIZE)
    tl.store(out + group, scale, mask=group < num_values // SIZE)


@triton.jit
def amax_of_groups(x, out, num_values, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Largest magnitude of every ``SIZE`` neighbours, compared as integers: NaN is the largest of all."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    y = tl.load(x + at, mask=at < num_values, other=0.0).to(tl.float32)
    magnitudes = tl.reshape(y.to(tl.int32, bitcast=True) & _MAGNITUDE, (BLOCK // SIZE, SIZE))
    largest = tl.max(magnitudes, axis=1).to(tl.float32, bitcast=True)
    group = first // SIZE + tl.arange(0, BLOCK // SIZE)
    tl.store(out + group, largest, mask=group < num_values // SIZE)
