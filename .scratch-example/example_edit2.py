exec(open('/tmp/example_edit.py').read().split("SLOTS_DOC")[0])
sub('jla/linen/_arguments.py',
 ("from jla._core import checks, whole\n","from jla._core import checks, pools, whole\n"),
 ('''def check_size(name, size, least, hint=""):''','''def check_slots(layer, slots, inputs):
    """Checks the slots of a call, without the size of the pool; None is for no pool."""
    if slots is None:
        return
    if not layer.decode:
        raise ValueError("slots need decode=True, got False: they are rows of a cache")
    if layer.is_initializing():
        raise ValueError(
            "slots must be None in init: the rows of its inputs become the rows of the cache"
        )
    checks.check_shapes(inputs=(inputs, "B T D"), slots=(slots, "B"))
    checks.check_dtype("slots", slots, [jnp.int32])


def check_size(name, size, least, hint=""):'''),
 ('''def check_cache(layer, **entries):
    """Raises ValueError or TypeError unless a decoding call of `layer` has a fitting cache.

    Args:
      layer: a module with `decode`.
      entries:''','''def check_cache(layer, slots=None, /, **entries):
    """Raises ValueError or TypeError unless a decoding call of `layer` has a fitting cache.

    Args:
      layer: a module with `decode`.
      slots: the call's, or None. With them the cache may have any number of rows.
      entries:'''),
 ('''        cached, path = layer.get_variable("cache", name), "/".join((*layer.path, name))
''','''        cached, path = layer.get_variable("cache", name), "/".join((*layer.path, name))
        if slots is not None and cached.ndim:
            shape = (cached.shape[0], *shape[1:])
            pools.check(slots, cached.shape[0])
'''),
)
sub('jla/linen/_padding.py',
 ('''import jax.numpy as jnp

from jla._core.segments import segment_index
''','''import jax.numpy as jnp

from jla._core import pools
from jla._core.segments import segment_index
'''),
)
s=open('jla/linen/_padding.py').read()
s+='''

def of_live_rows(inputs, mask, slots):
    """The inputs, the mask and the slots of a call on a pool.

    Rows without a sequence become zeros, and so they stay: see `zeros_elsewhere`. A row whose only
    token is padding has nothing to say to its sequence, and counts as one without.
    """
    slots = jnp.asarray(slots)
    if mask is not None and inputs.shape[1] == 1:
        slots, mask = jnp.where(mask[:, 0], slots, -1), None
    return pools.zero_unless(slots >= 0, jnp.asarray(inputs)), mask, slots


def zeros_elsewhere(restore, slots):
    """`restore`, then zeros in the rows without a sequence."""
    return lambda y: pools.zero_unless(slots >= 0, restore(y))
'''
open('jla/linen/_padding.py','w').write(s)
sub('jla/linen/mixer.py',
 ("from jla._core import axes, checks, sequence, whole\n","from jla._core import axes, checks, pools, sequence, whole\n"),
 ("from jla.linen._padding import arrange\n","from jla.linen._padding import arrange, of_live_rows, zeros_elsewhere\n"),
 ('''      copies: x once for each device that heads are split over, see `_projections.copies`; or None.
    """
''','''      copies: x once for each device that heads are split over, see `_projections.copies`; or None.
      slots: int32 [B], the rows of the cache that the rows go on from; None if they are the same.
    """
'''),
 ('''    copies: jax.Array | None = None

    def zero_padding''','''    copies: jax.Array | None = None
    slots: jax.Array | None = None

    def zero_padding'''),
 ('''class Cache(NamedTuple):
    """The variables of the "cache" collection that hold a mechanism's state.

    Attributes:
      make: makes the state of the variables' values, given by name.
      variables: by name, in the order of the state's leaves.
    """

    make: Callable
    variables: dict

    @property
    def state(self):
        return self.make(**{name: x.value for name, x in self.variables.items()})

    def update(self, state):
        for variable, x in zip(self.variables.values(), jax.tree.leaves(state), strict=True):
            variable.value = x
''','''def arranged(inputs, mask, segment_ids, slots=None):
    """The tokens of a call whose arguments were checked."""
    if slots is None:
        return Tokens(*arrange(inputs, mask, segment_ids))
    inputs, mask, slots = of_live_rows(inputs, mask, slots)
    tokens = Tokens(*arrange(inputs, mask, segment_ids), slots=slots)
    return tokens._replace(restore=zeros_elsewhere(tokens.restore, slots))


class Cache(NamedTuple):
    """The variables of the "cache" collection that hold a mechanism's state.

    Attributes:
      make: makes the state of the variables' values, given by name.
      variables: by name, in the order of the state's leaves.
      slots: int32 [B], the rows of the variables that a call goes on from; None for all.
    """

    make: Callable
    variables: dict
    slots: jax.Array | None = None

    @property
    def whole(self):
        """The state of all rows of the variables."""
        return self.make(**{name: x.value for name, x in self.variables.items()})

    @property
    def state(self):
        """The state of the call's rows."""
        return self.whole if self.slots is None else pools.take(self.whole, self.slots)

    def replace(self, state):
        """Sets the state of all rows."""
        for variable, x in zip(self.variables.values(), jax.tree.leaves(state), strict=True):
            variable.value = x

    def update(self, state):
        """Sets the state of the call's rows."""
        self.replace(state if self.slots is None else pools.put(self.whole, state, self.slots))
'''),
 ('''        first segment, and is that of its last segment afterwards.

    It returns''','''        first segment, and is that of its last segment afterwards.
      slots: int32 [B], with `decode`: the rows of the cache that the inputs' rows go on from. The
        cache then is a pool of any number of rows, that of `init`'s inputs. -1 is a row without a
        sequence: its output is zero, and nothing is written. See docs/pools.md.

    It returns'''),
 ('''        tokens, sizes = self.begin(inputs, mask, segment_ids)
''','''        tokens, sizes = self.begin(inputs, mask, segment_ids, slots)
'''),
 ('''    def begin(self, inputs, mask, segment_ids):
''','''    def begin(self, inputs, mask, segment_ids, slots=None):
'''),
 ('''        _arguments.check_convolution(self.conv_size, self.conv_bias)
        split = _arguments.split_of(self)
        if split is None and self.split_over is None:
            return Tokens(*arrange(inputs, mask, segment_ids)), self.sizes(T, D)
''','''        _arguments.check_convolution(self.conv_size, self.conv_bias)
        _arguments.check_slots(self, slots, inputs)
        split = _arguments.split_of(self)
        if split is None and self.split_over is None:
            return arranged(inputs, mask, segment_ids, slots), self.sizes(T, D)
'''),
 ('''        if self.split_over is None:
            tokens = Tokens(*arrange(inputs, mask, segment_ids))
''','''        if self.split_over is None:
            tokens = arranged(inputs, mask, segment_ids)
'''),
 ('''        return convolution(x, tokens.segments, tokens.lengths)
''','''        return convolution(x, tokens.segments, tokens.lengths, tokens.slots)
'''),
 ('''    def cached(self, make, **entries):
        """The cache of the mechanism's state, checked; None without `decode`.

        Args:
          make: as `Cache` has it.
          entries:''','''    def cached(self, make, tokens, **entries):
        """The cache of the mechanism's state, checked; None without `decode`.

        Args:
          make: as `Cache` has it.
          tokens: from `begin`.
          entries:'''),
 ('''        _arguments.check_cache(self, **entries)
''','''        _arguments.check_cache(self, tokens.slots, **entries)
'''),
 ('''        return Cache(make, variables)
''','''        return Cache(make, variables, tokens.slots)
'''),
 ('''          step: the same of one token, whose arrays have no axis of time; None if `run` does it.
''','''          step: the same of one token, whose arrays have no axis of time; None if `run` does it. Of
            a pool it takes and returns all rows, and `slots`.
'''),
 ('''            step = _arguments.unless_initializing(self, step)
            o, state = step(*(x[:, 0] for x in arrays), cache.state)
            o = o[:, None]
''','''            step = _arguments.unless_initializing(self, step)
            slots = {} if cache.slots is None else dict(slots=cache.slots)
            o, state = step(*(x[:, 0] for x in arrays), cache.whole, **slots)
            if not self.is_initializing():
                cache.replace(state)
            return o[:, None]
'''),
 ('''        else:
            o, state = run(*arrays, cache.state)
        if not self.is_initializing():
            cache.update(state)
        return o
''','''        o, state = run(*arrays, cache.state)
        if not self.is_initializing():
            cache.update(state)
        return o
'''),
)
CALL=('''        segment_ids: jax.Array | None = None,
    ) -> jax.Array:''','''        segment_ids: jax.Array | None = None,
        slots: jax.Array | None = None,
    ) -> jax.Array:''')
BEGIN=("self.begin(inputs, mask, segment_ids)","self.begin(inputs, mask, segment_ids, slots)")
sub('jla/linen/kda.py', CALL, BEGIN,
 ("cache = self.cached(lambda recurrent_state: recurrent_state, recurrent_state=entry)","cache = self.cached(lambda recurrent_state: recurrent_state, tokens, recurrent_state=entry)"),
 ('''        def step(q, k, v, f, beta, state):
            real = None if tokens.real is None else tokens.real[:, 0]
            arguments = q, k, v, f, A_log, dt_bias, beta, state
            return _fused.kda_step_from_projection(*arguments, real=real, **options)
''','''        def step(q, k, v, f, beta, state, slots=None):
            real = None if tokens.real is None else tokens.real[:, 0]
            arguments = q, k, v, f, A_log, dt_bias, beta, state
            return _fused.kda_step_from_projection(*arguments, real=real, slots=slots, **options)
'''))
sub('jla/linen/gsa.py', CALL, BEGIN,
 ("self.cached(GSAState, hk=((B, HK, K, M), f32), hv=((B, HK, M, V), f32))","self.cached(GSAState, tokens, hk=((B, HK, K, M), f32), hv=((B, HK, M, V), f32))"))
sub('jla/linen/mesa_net.py', CALL, BEGIN,
 ("self.cached(MesaState, kk=","self.cached(MesaState, tokens, kk="),
 ('''        def step(q, k, v, g, beta, state):
''','''        def step(q, k, v, g, beta, state, slots=None):
'''),
 ('''            options = dict(cg_steps=steps, implementation=self.implementation)
            return mesa_step''','''            options = dict(cg_steps=steps, slots=slots, implementation=self.implementation)
            return mesa_step'''))
sub('jla/linen/log_linear.py', CALL, BEGIN,
 ("cache = self.cached(LazyLogLinearState, **entries,","cache = self.cached(LazyLogLinearState, tokens, **entries,"),
 ('''        def step(q, k, u, d, logits, before):
            g, dt = gates(d)
            o, state = _fused.log_linear_mamba2_step(
                q, k, u, g, logits, dt, skip, before, implementation=self.implementation
            )
''','''        def step(q, k, u, d, logits, before, slots=None):
            g, dt = gates(d)
            options = dict(slots=slots, implementation=self.implementation)
            o, state = _fused.log_linear_mamba2_step(
                q, k, u, g, logits, dt, skip, before, **options
            )
'''))
sub('jla/_fused.py',
 ('''    lower_bound: float | None = None,
    real: Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[Outputs, KDAState]:
    """One token of `kda_from_projection`; arrays without the axis of time, `real` is [B]."""
    g, beta = kda_operands(f, A_log, dt_bias, beta, lower_bound, real)
    return kda_step(q, k, v, g, beta, state, implementation=implementation)
''','''    lower_bound: float | None = None,
    real: Array | None = None,
    slots: Slots | None = None,
    implementation: Implementation | None = None,
) -> tuple[Outputs, KDAState]:
    """One token of `kda_from_projection`; arrays without the axis of time, `real` is [B]."""
    g, beta = kda_operands(f, A_log, dt_bias, beta, lower_bound, real)
    return kda_step(q, k, v, g, beta, state, slots=slots, implementation=implementation)
'''),
 ('''    state: State,
    *,
    implementation: Implementation | None = None,
) -> tuple[Outputs, State]:
    """One token of `log_linear_mamba2`; arrays without the axis of time."""
    v, level_scales, skipped = mamba2_operands(u, logits, dt, skip)
    o, state = log_linear_step(q, k, v, g, level_scales, state, implementation=implementation)
''','''    state: State,
    *,
    slots: Slots | None = None,
    implementation: Implementation | None = None,
) -> tuple[Outputs, State]:
    """One token of `log_linear_mamba2`; arrays without the axis of time."""
    v, level_scales, skipped = mamba2_operands(u, logits, dt, skip)
    options: dict[str, Any] = dict(slots=slots, implementation=implementation)
    o, state = log_linear_step(q, k, v, g, level_scales, state, **options)
'''),
 ("    SegmentIds,\n    Strengths,","    SegmentIds,\n    Slots,\n    Strengths,"))
sub('jla/linen/_short_convolution.py',
 ("from jla._core import whole\n","from jla._core import pools, whole\n"),
 ('''        self, x: Array, segments: Array | None = None, lengths: Array | None = None
    ) -> jax.Array:''','''        self,
        x: Array,
        segments: Array | None = None,
        lengths: Array | None = None,
        slots: Array | None = None,
    ) -> jax.Array:'''),
 ('''            enter the cache. T for every row if None.
''' if False else '''            enter the cache.''' if False else '''T for every row if None.
''','''T for every row if None.
          slots: int32 [B], the rows of the cache that x's rows go on from; None if they are the
            same.
'''),
 ("        check_cache(self, inputs=","        check_cache(self, slots, inputs="),
 ('''            before = cache.value
            if not self.is_initializing():
                cache.value = _last_inputs(before, x, segments, lengths)
''','''            before = cache.value if slots is None else pools.take(cache.value, slots)
            if not self.is_initializing():
                last = _last_inputs(before, x, segments, lengths)
                cache.value = last if slots is None else pools.put(cache.value, last, slots)
'''))
sub('jla/linen/path_attention.py', CALL, BEGIN,
 ("cache = self._cache(v, H, K)","cache = self._cache(v, H, K, tokens)"),
 ("    def _cache(self, v, H, K):","    def _cache(self, v, H, K, tokens):"),
 ('''            functools.partial(PathCache, **{} if decay else dict(decay=None)),
''','''            functools.partial(PathCache, **{} if decay else dict(decay=None)),
            tokens,
'''),
 ('''        return self.finish(self.mix(run, None, (q, k, v, w, beta, g), cache), tokens)
''','''        def on_pool(*arguments, slots):
            *arrays, pool = arguments
            check_room(pool, 1, slots=slots, set_by=_SET_BY)
            options = dict(scale=arrays[1].shape[2] ** -0.5, implementation=self.implementation)
            return _step_on_pool(*arrays, pool, slots, **options)

        arrays = q, k, v, w, beta, g
        step = None if tokens.slots is None else on_pool
        return self.finish(self.mix(run, step, arrays, cache), tokens)
'''),
 ('''set_by="the length of init's input")''','''slots=live, set_by=_SET_BY)'''),
 ("f32 = jnp.float32\n",'''f32 = jnp.float32
_SET_BY = "the length of init's input"
'''),
)
