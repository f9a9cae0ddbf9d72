"""What an entry of the contract's tables says: a mechanism and its implementations."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import triton_interpreter

import jla.pallas

FLOATS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Backend:
    """What belongs to an implementation as such, whatever the mechanism.

    name: as `implementation=` takes it.
    dtypes: of q, k and v; the first serves every test that needs only one.
    context: entered around every small call; an interpreter, for kernels.
    compiled_on: the platform of what only a compiled program shows: sharding, rematerialization,
      how often is compiled. Interpreted kernels have effects, which stand in the way of all three.
    linearizes: whether it has a forward-mode derivative.
    own_process: whether `context` is one for which a process of its own is made.
    slow: the tests that show what others do, and cost more here than they are worth every time.
    """

    name: str
    dtypes: tuple[str, ...] = FLOATS
    context: Callable = contextlib.nullcontext
    compiled_on: str = "cpu"
    linearizes: bool = True
    own_process: bool = False
    slow: tuple[str, ...] = ()


REFERENCE = Backend(
    "reference",
    # It is a scan of plain jnp: others would fail with it.
    slow=(
        "test_a_later_tokens_gate_moves_no_earlier_output",
        "test_any_batch_and_length_from_a_state_with_segments",
        "test_any_batch_and_length_alone",
        "test_new_contents_never_compile",
        # The layers' formulas in NumPy start from zeros, and layers without a cache give no state.
        "test_no_initial_state_is_zeros",
        "test_shardings_in_types",
        "test_sharded_under_jit",
        "test_split_is_whole",
        "test_step_in_a_scan_over_layers",
        "test_values_under_x64",
        "test_vmap_and_checkpoint",
    ),
)
XLA = Backend(
    "xla",
    slow=("test_head_dimensions", "test_split_is_whole", "test_step_in_a_scan_over_layers"),
)
PALLAS = Backend(
    "pallas",
    dtypes=("bfloat16", "float16"),
    context=jla.pallas.interpret,
    compiled_on="gpu",
    linearizes=False,  # a custom_vjp
    # Several seconds each in the interpreter.
    slow=(
        "test_a_later_tokens_gate_moves_no_earlier_output",
        # Decoding shows, too, that a state continues, and the cotangents of states are among those
        # of `test_values_and_gradients`.
        "test_a_split_and_its_gradients_are_the_whole",
        # `test_packed_is_the_definition` has segments of one token, alone and several together.
        "test_every_token_its_own_segment",
        "test_good_inputs_make_no_nan",
        # The small cases have one row, and this wants two.
        "test_nan_in_one_row_stays_there",
        "test_values_under_x64",
    ),
)
TRITON = Backend(
    "triton",
    context=triton_interpreter.interpreting,
    compiled_on="gpu",
    linearizes=False,
    own_process=True,
    # About two seconds each; the others take less.
    slow=(
        "test_a_split_and_its_gradients_are_the_whole",
        # Up to ten seconds: tests/triton/test_steps.py has the steps, and a GPU all tokens.
        "test_decode_is_forward",
        "test_good_inputs_make_no_nan",
        # What kernels write in place is at stake, and only a GPU's do: it runs there.
        "test_step_in_a_scan_over_layers",
        "test_values_under_x64",
    ),
)

# What one mechanism shows for all, because JAX and not its own code makes it so: the `slow` of a
# mechanism. The first in `MECHANISMS` runs them.
SHOWN_BY_ANOTHER = (
    "test_linearize",
    "test_new_contents_never_compile",
    "test_shardings_in_types",
    "test_vmap_and_checkpoint",
)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A mechanism's form in one backend, and what of the suite it takes.

    sizes: the shape letters of the small case that most tests use.
    full: those of the case that runs on the GPU, in tests marked `gpu`; None for none.
    lengths, head_dims: for "Any length, any head dimension": values of T, and edits of `sizes`.
    beyond: the stress cases that its precision does not reach; its documentation says so.
    ends_together: whether it has a loop that ends when it may for all rows, or a part left out when
      no row needs it, so that devices tell each other one bit.
    slow: as of the backend, for this mechanism.
    """

    backend: Backend
    sizes: Mapping[str, int]
    full: Mapping[str, int] | None = None
    lengths: tuple[int, ...] = ()
    head_dims: tuple[Mapping[str, int], ...] = ()
    beyond: tuple[str, ...] = ()
    ends_together: bool = False
    slow: tuple[str, ...] = ()

    @property
    def name(self):
        return self.backend.name

    @property
    def dtypes(self):
        return self.backend.dtypes

    @property
    def context(self):
        return self.backend.context

    @property
    def compiled_on(self):
        return self.backend.compiled_on

    @property
    def linearizes(self):
        return self.backend.linearizes

    @property
    def own_process(self):
        return self.backend.own_process

    @property
    def interpreted(self):
        return self.context is not contextlib.nullcontext

    def compiled(self):
        """The same without an interpreter."""
        backend = dataclasses.replace(
            self.backend, context=contextlib.nullcontext, own_process=False
        )
        return dataclasses.replace(self, backend=backend)

    def choice(self, cases, few):
        """`cases`, or the `few` that must do where each takes an interpreter seconds."""
        return few if self.interpreted else cases


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """One mechanism.

    axes: every float argument and its axis letters (a tree of them, where the argument is one);
      those with a T are the tokens', those without a B all rows share, the other is the initial
      state. All are differentiated.
    outputs: the axis letters of what `run` returns, a tree.
    make: `arguments` of the mechanism's module in `cases`: (sizes, normal, dtype) to a dict of the
      arguments in `axes`. NumPy arrays, as all edits make them.
    stress: name to an edit of that dict; values and gradients must stay right under each.
    operations: the most that values and gradients in "xla" may have, loops' bodies once: a tenth
      above what they have. Whoever needs more measures the compile time, too.
    heads: the letters of key heads, and of the heads that come in groups; the same if none do.
    unrolls: whether the program of "xla" grows with the number of chunks, on purpose.
    undamped: the stress cases in which nothing decays, so that every token's rounding stays and the
      error grows with T: name to the most tokens on which they are tried. docs/<mechanism>.md says
      how the error grows.
    later: an edit of one argument's tokens: (name, array) to an array that differs everywhere.
    state: the name of the argument that the returned state goes into: for `run`, and for `step`.
    tolerances: dtype to the largest relative error of values and of gradients.
    golden, golden_outputs, golden_state: the files in tests/golden, and what they call the leaves
      of the outputs and of the initial state.
    mistakes, step_mistakes: (id, edit of the arguments, exception, fragments of its message).
    slow: the tests that another mechanism shows; see `Backend`.
    unused: (state, number) to the state with that number in all places that hold nothing; None
      where all hold something.
    optional: the arguments, besides the state, that may be None.
    tight: an edit of the arguments without a state, T a power of two: what follows would not fit.
    always_returns_state: whether a run that is given no state returns one.
    """

    name: str
    run: Callable
    step: Callable
    axes: Mapping[str, object]
    outputs: tuple
    make: Callable
    stress: Mapping[str, Callable]
    operations: int
    later: Callable
    state: tuple[str, str]
    implementations: tuple[Implementation, ...]
    golden: tuple[str, ...]
    golden_outputs: tuple[str, ...]
    golden_state: tuple[str, ...]
    mistakes: tuple
    step_mistakes: tuple
    tolerances: Mapping[str, tuple[float, float]] = dataclasses.field(
        default_factory=lambda: {
            "float32": (1e-4, 1e-4),
            "bfloat16": (1e-2, 2e-2),
            "float16": (1e-2, 2e-2),
        }
    )
    undamped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    heads: tuple[str, str] = ("H", "H")
    unrolls: bool = False
    unused: Callable | None = None
    slow: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    tight: Callable = lambda args: args
    always_returns_state: bool = True

    def form(self, backend):
        """The implementation of that name, or None."""
        return next((i for i in self.implementations if i.name == backend), None)

    def tokenwise(self):
        """The names of the arguments with a time axis."""
        return [
            name
            for name, axes in self.axes.items()
            if all("T" in leaf.split() for leaf in jax.tree.leaves(axes))
        ]

    def shared(self):
        """The names of the arguments without a batch axis."""
        return [
            name
            for name, axes in self.axes.items()
            if not any("B" in leaf.split() for leaf in jax.tree.leaves(axes))
        ]


def put(x, place, value):
    """x with the value at that place."""
    x = x.copy()
    x[place] = value
    return x


def edit(**edits):
    """An edit of the arguments: each value is the new one, or a function of the old one."""
    return lambda args: args | {n: e(args.get(n)) if callable(e) else e for n, e in edits.items()}


# Mistakes that every mechanism with these arguments refuses in the same way.
SCALE_MISTAKES = (
    ("scale an array", edit(scale=lambda _: jnp.ones(())), TypeError, ("scale", "number")),
    ("scale a string", edit(scale="big"), TypeError, ("scale", "str")),
    ("scale a bool", edit(scale=True), TypeError, ("scale", "bool")),
)
GATE_MISTAKES = (
    ("g in bfloat16", edit(g=lambda x: x.astype(jnp.bfloat16)), TypeError, ("g ", "bfloat16")),
    ("g per head", edit(g=lambda x: x[..., 0]), ValueError, ("g ", "shape")),
)
COMMON_MISTAKES = (
    *SCALE_MISTAKES,
    ("q is a list", edit(q=[1.0, 2.0]), TypeError, ("q ", "array", "list")),
    ("q of integers", edit(q=lambda x: x.astype(jnp.int32)), TypeError, ("q ", "int32")),
    (
        "k of another dtype",
        edit(k=lambda x: x.astype(jnp.bfloat16)),
        TypeError,
        ("k ", "bfloat16"),
    ),
    ("k of another K", edit(k=lambda x: x[..., :-1]), ValueError, ("k ", "K")),
    ("v of another B", edit(v=lambda x: x[:1]), ValueError, ("v ", "B")),
    (
        "no such implementation",
        edit(implementation="cuda"),
        ValueError,
        ("implementation", "'cuda'"),
    ),
)
COMMON_RUN_MISTAKES = (
    (
        "q with heads before time",
        edit(q=lambda x: x.swapaxes(1, 2)),
        ValueError,
        ("k ", "heads are axis 2", "x.swapaxes(1, 2)"),
    ),
    ("k of another T", edit(k=lambda x: x[:, 1:]), ValueError, ("k ", "T")),
    (
        "V too small",
        edit(v=lambda x: x[..., :8], initial_state=None),
        ValueError,
        ("dimension V must be 16 to ", "8"),
    ),
    (
        "segment_ids of floats",
        edit(segment_ids=lambda _: jnp.zeros((2, 100))),
        TypeError,
        ("segment_ids", "float32"),
    ),
    (
        "segment_ids of one row",
        edit(segment_ids=lambda _: jnp.zeros(100, jnp.int32)),
        ValueError,
        ("segment_ids", "[B, T]"),
    ),
)
