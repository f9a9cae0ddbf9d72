"""What the kernels of several mechanisms share: products, tiles, masks, decays, the inverse.

A chunk has 64 tokens. Inside a kernel, `i` and `j` are a chunk's tokens and exponents are in base
2. Products take operands of the inputs' dtype and add in float32; float32 operands are multiplied
as three TF32 products, in KDA's `product` as three of bfloat16.
"""

import triton
import triton.language as tl

CHUNK: tl.constexpr = tl.constexpr(64)
LEVELS: tl.constexpr = tl.constexpr(6)
# Decays between tokens of the same 2**NEAR tokens are products of exp2(x) and exp2(-x), as long as
# x is at least -LIMIT for the later token.
NEAR: tl.constexpr = tl.constexpr(4)
LIMIT = tl.constexpr(100.0)
# Numbers of the masks in memory: those from 0 to 5 are the levels'.
NEAR_MASK: tl.constexpr = tl.constexpr(6)
UP_TO: tl.constexpr = tl.constexpr(7)
AFTER: tl.constexpr = tl.constexpr(8)


@triton.jit
def dot(a, b):
    """a @ b in float32."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def exact_dot(a, b):
    """a @ b in float32; of float32 operands by float32 products, each sum rounded to the nearest.

    TF32's three products leave out that of what TF32 cuts off of both operands, and tensor cores
    cut sums off. Both are 1e-7 of the whole where equal rows multiply each other, and always in
    one direction, so that no later sum evens them out.
    """
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def dot_add(a, b, acc):
    """acc + a @ b in float32."""
    return tl.dot(a, b, acc=acc, input_precision="tf32x3")


@triton.jit
def product(a, b):
    """a @ b in float32; of float32 operands 16 bits count, as three products of bfloat16."""
    return tl.dot(a, b, input_precision="bf16x3")


@triton.jit
def product_add(a, b, acc):
    """acc + a @ b, as `product`."""
    return tl.dot(a, b, acc=acc, input_precision="bf16x3")


@triton.jit
def sum_rows(mask, x):
    """mask @ x in float32, for a mask of 16 bits; a float32 x is two numbers of its dtype."""
    if x.dtype == tl.float32:
        high, low = _split(x, mask.dtype)
        return dot_add(mask, high, dot(mask, low))
    else:
        return dot(mask, x)


@triton.jit
def sum_columns(x, mask):
    """x @ mask, as `sum_rows`."""
    if x.dtype == tl.float32:
        high, low = _split(x, mask.dtype)
        return dot_add(high, mask, dot(low, mask))
    else:
        return dot(x, mask)


@triton.jit
def sum_columns_add(x, mask, acc):
    """acc + x @ mask, as `sum_rows`."""
    if x.dtype == tl.float32:
        high, low = _split(x, mask.dtype)
        return dot_add(high, mask, dot_add(low, mask, acc))
    else:
        return dot_add(x, mask, acc)


@triton.jit
def _split(x, DTYPE: tl.constexpr):
    """The two numbers of a 16-bit dtype whose sum is x as nearly as they can be."""
    high = x.to(DTYPE)
    return high, (x - high.to(tl.float32)).to(DTYPE)


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where products are added, float32."""
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def by_row(x):
    """x, [64, ...], made of what was loaded, before it becomes an operand.

    Triton would load each of x's parts in the layout of an operand of mma.sync, in which several
    warps have the same numbers, and compute there: with twice to four times the registers. It does
    not where a number depends on its row.
    """
    return tl.where((tl.arange(0, CHUNK) >= 0)[:, None], x, tl.zeros_like(x))


# ------------------------------------------------------------------------------ tiles


@triton.jit
def place(parts: tl.constexpr, N, HV: tl.constexpr):
    """A program's part of a chunk (the fastest), value head, chunk and batch row (the slowest).

    Neighbouring heads lie together in memory, and value heads may share a key head.
    """
    program = tl.program_id(0)
    part = program % parts
    h = program // parts % HV
    n = program // (parts * HV) % N
    b = program // (parts * HV * N)
    return part, h, n, b


@triton.jit
def tile_at(ptr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to WIDTH columns of ROWS rows, which are D numbers apart, from `ptr` on."""
    return ptr + tl.arange(0, ROWS)[:, None] * D + tl.arange(0, WIDTH)[None, :]


@triton.jit
def token_tile(ptr, b, n, h, column, T, H: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """Pointers to W columns, from `column`, of a chunk's tokens in an array [B, T, H, D]."""
    base = ptr + ((b * T + n * CHUNK).to(tl.int64) * H + h) * D + column
    return tile_at(base, H * D, CHUNK, W)


@triton.jit
def chunk_tile(ptr, b, n, h, column, N, HV: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """As `token_tile`, in an array between kernels, [B, HV, N * 64, D]."""
    base = ptr + ((b * HV + h) * N + n).to(tl.int64) * (CHUNK * D) + column
    return tile_at(base, D, CHUNK, W)


@triton.jit
def real_tokens(n, T):
    """[i, 1]: which tokens of a chunk there are."""
    return (tl.arange(0, CHUNK) + n * CHUNK < T)[:, None]


@triton.jit
def real_columns(real, columns, D: tl.constexpr):
    """`real` [rows, 1], and where tiles do not divide D, which of the columns there are."""
    if D // columns.shape[0] * columns.shape[0] != D:
        return real & (columns < D)[None, :]
    else:
        return real


@triton.jit
def load_tokens(pointers, n, T, WHOLE: tl.constexpr):
    """Loads a tile of tokens; those from T on are zeros. WHOLE: T is whole chunks."""
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=real_tokens(n, T), other=0.0)


@triton.jit
def store_tokens(pointers, x, n, T, WHOLE: tl.constexpr):
    """Stores a tile of tokens, but for those from T on."""
    x = x.to(pointers.dtype.element_ty)
    if WHOLE:
        tl.store(pointers, x)
    else:
        tl.store(pointers, x, mask=real_tokens(n, T))


@triton.jit
def load_scalars(ptr, b, n, h, T, HV: tl.constexpr):
    """A number for each token of a chunk, of an array [B, T, HV]; zeros from T on."""
    t = tl.arange(0, CHUNK) + n * CHUNK
    return tl.load(ptr + (b * T + t).to(tl.int64) * HV + h, mask=t < T, other=0.0)


@triton.jit
def load_diagonal(ptr, b, n, h, N, HV: tl.constexpr):
    """The diagonal of a chunk's square, [64] float32, of an array [B, HV, N * 64, 64]."""
    ptr += ((b * HV + h) * N + n).to(tl.int64) * (CHUNK * CHUNK)
    return tl.load(ptr + tl.arange(0, CHUNK) * (CHUNK + 1)).to(tl.float32)


@triton.jit
def matrix_tile(ptr, rows, columns, D: tl.constexpr, E: tl.constexpr):
    """Pointers to rows and columns of the matrix [D, E] at `ptr`, and which of them there are."""
    pointers = ptr + (rows[:, None] * E + columns[None, :])
    return pointers, (rows < D)[:, None] & (columns < E)[None, :]


@triton.jit
def load_matrix(ptr, rows, columns, D: tl.constexpr, E: tl.constexpr):
    """What `matrix_tile` points to; zeros where there is nothing."""
    pointers, real = matrix_tile(ptr, rows, columns, D, E)
    R: tl.constexpr = rows.shape[0]
    C: tl.constexpr = columns.shape[0]
    if D // R * R == D and E // C * C == E:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=real, other=0.0)


@triton.jit
def chunks_of_piece(spans_ptr, b, N, P: tl.constexpr):
    """The first of the chunks that a program runs, the one after the last, and the piece's number.

    With P pieces, the second axis of programs, `spans` [B, P, 2] has each one's first chunk and
    their number. With P = 0 there is one of all N chunks, and `spans` is not read.
    """
    if P == 0:
        return 0, N, 0
    else:
        p = tl.program_id(1)
        first = tl.load(spans_ptr + (b * P + p) * 2)
        return first, first + tl.load(spans_ptr + (b * P + p) * 2 + 1), p


@triton.jit
def state_of_piece(bh, p, P: tl.constexpr):
    """The number of a piece's state, of row and head bh, in an array [B, H, P, ...]."""
    if P == 0:
        return bh
    else:
        return bh * P + p


# ------------------------------------------------------------------------------ masks, [64, 64]


@triton.jit
def _tokens():
    return tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]


@triton.jit
def up_to():
    """[i, j]: j <= i."""
    i, j = _tokens()
    return j <= i


@triton.jit
def before():
    """[i, j]: j < i."""
    i, j = _tokens()
    return j < i


@triton.jit
def same():
    """[i, j]: i = j."""
    i, j = _tokens()
    return i == j


@triton.jit
def identity():
    """[i, j]: 1.0 where i = j, else 0.0."""
    return tl.where(same(), 1.0, 0.0)


@triton.jit
def near_pairs(only):
    """[i, j]: j < i in the same 2**NEAR tokens, for the tokens i that `only` [64] marks."""
    i, j = _tokens()
    return (j < i) & ((j >> NEAR) == (i >> NEAR)) & only[:, None]


@triton.jit
def level_pairs(level, far):
    """[i, j]: whether the level serves the pair: i in the right half of a block, j in the left.

    At the levels below NEAR only for the tokens i that `far` [64] marks.
    """
    i, j = _tokens()
    half = i >> level
    serves = ((half & 1) == 1) & ((level >= NEAR) | far[:, None])
    return (j >> level) == tl.where(serves, half - 1, -1)


# ------------------------------------------------------------------------------ decays


@triton.jit
def load_mask(masks_ptr, number):
    """A mask of `jla.triton.masks`, [64, 64], of the array's dtype."""
    i, j = _tokens()
    return tl.load(masks_ptr + number * (CHUNK * CHUNK) + i * CHUNK + j)


@triton.jit
def near_decays(log_decays):
    """The two factors of decays between tokens of the same 2**NEAR tokens.

    Args:
      log_decays: of each token, from the block's first one (exclusively), in base 2.

    Returns:
      exp2 of them and of what they lack; the latter at most 2**LIMIT.
    """
    return tl.exp2(log_decays), tl.exp2(tl.minimum(-log_decays, LIMIT))


# ------------------------------------------------------------------------------ inverse


@triton.jit
def unit_lower_inverse(a, DTYPE: tl.constexpr):
    """(I + a)^-1 in float32, for a strictly lower triangular float32 `a`, [64, 64].

    Block substitution: X is the inverse of the diagonal blocks of 2**level, and X - X L X, with L
    the part of `a` that joins two of them, that of the blocks twice as large. No power of `a` is
    formed: for keys that repeat they overflow. With 16-bit operands a Newton step follows,
    X + X (I - (I + a) X), with the residual from 16 bits of each factor: it squares the error.
    """
    all_rows = tl.arange(0, CHUNK) >= 0
    x = identity() - tl.where(level_pairs(0, all_rows), a, 0.0)
    for level in range(1, LEVELS):
        joined = tl.where(level_pairs(level, all_rows), a, 0.0).to(DTYPE)
        rounded = x.to(DTYPE)
        x -= dot(rounded, dot(joined, rounded).to(DTYPE))
    if DTYPE != tl.float32:
        a_high, a_low = _split(a, tl.bfloat16)
        high, low = _split(x, tl.bfloat16)
        product = dot_add(a_low, high, dot_add(a_high, low, dot(a_high, high)))
        residual = (identity() - x - product).to(DTYPE)
        x += dot(high.to(DTYPE), residual)
    return x
