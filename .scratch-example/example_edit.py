import re
def sub(path, *pairs):
    s=open(path).read()
    for a,b in pairs:
        assert a in s, (path, a)
        assert s.count(a)==1, (path, a, s.count(a))
        s=s.replace(a,b)
    open(path,'w').write(s)

SLOTS_DOC = """      slots: None, or int32 [B]: `state` is then a pool of R rows, {pool}, and row i goes on from
        `state[slots[i]]` and writes there. -1 is a row without a sequence: its output is zero, and
        nothing is written. All else of the pool stays as it is; see docs/decoding.md.
"""
# kda
sub('jla/kda.py',
 ("from jla._core import axes, checking, checks, movement, sequence","from jla._core import axes, checking, checks, movement, pools, sequence"),
 ("    SegmentIds,\n    Sizes,\n    Strengths,","    SegmentIds,\n    Sizes,\n    Slots,\n    Strengths,"),
 ("    state: KDAState | NumpyArray,\n    *,\n    scale: float | None = None,\n","    state: KDAState | NumpyArray,\n    *,\n    scale: float | None = None,\n    slots: Slots | None = None,\n"),
 ("      scale: as in `kda`.\n      implementation", "      scale: as in `kda`.\n"+SLOTS_DOC.format(pool="[R, HV, K, V]")+"      implementation"),
 ("and the new state, [B, HV, K, V], float32.\n\n    Raises:\n      TypeError, ValueError, NotImplementedError: as `kda`.",
  "and the new state, [B, HV, K, V], float32; with\n      slots the whole pool.\n\n    Raises:\n      TypeError, ValueError, NotImplementedError: as `kda`. ValueError: slots that are known and\n        equal, or outside -1 to R - 1."),
 ("    sizes = checks.check_axes(_AXES_OF_STEP, q=q, k=k, v=v, g=g, beta=beta, state=state)","    sizes = pools.check_axes(_AXES_OF_STEP, slots, q=q, k=k, v=v, g=g, beta=beta, state=state)"),
 ('    _check_values("jla.kda_step", q, k, v, g, beta, state=state)\n    run = choose("kda_step", implementation, q, k, v, g, beta)\n    return run(q, k, v, g, beta, state, scale=scale)',
  '    _check_values("jla.kda_step", q, k, v, g, beta, state=state, slots=slots)\n    on_pool = checks.given(slots=slots)\n    run = choose("kda_step", implementation, q, k, v, g, beta, **on_pool)\n    return run(q, k, v, g, beta, state, scale=scale, **on_pool)'),
)
sub('jla/gsa.py',
 ("from jla._core import axes, checking, checks, movement, sequence","from jla._core import axes, checking, checks, movement, pools, sequence"),
 ("    Sizes,\n    SlotWrites,\n","    Sizes,\n    Slots,\n    SlotWrites,\n"),
 ("    state: GSAState,\n    *,\n    scale: float | None = None,\n","    state: GSAState,\n    *,\n    scale: float | None = None,\n    slots: Slots | None = None,\n"),
 ("      scale: as in `gsa`.\n      implementation", "      scale: as in `gsa`.\n"+SLOTS_DOC.format(pool="[R, H, K, M] and [R, H, M, V]").replace("`state[slots[i]]`","the state in row `slots[i]`")+"      implementation"),
 ("and the new `GSAState`.\n\n    Raises:\n      TypeError, ValueError, NotImplementedError: as `gsa`.",
  "and the new `GSAState`; with slots the whole pool.\n\n    Raises:\n      TypeError, ValueError, NotImplementedError: as `gsa`. ValueError: slots that are known and\n        equal, or outside -1 to R - 1."),
 ("    sizes = checks.check_axes(_AXES_OF_STEP, q=q, k=k, v=v, s=s, g=g, state=state)","    sizes = pools.check_axes(_AXES_OF_STEP, slots, q=q, k=k, v=v, s=s, g=g, state=state)"),
 ('    checking.values("jla.gsa_step", q=q, k=k, v=v, s=s, g=g, state=state)\n    run = choose("gsa_step", implementation, q, k, v, s, g)\n    return run(q, k, v, s, g, state, scale=scale)',
  '    checking.values("jla.gsa_step", q=q, k=k, v=v, s=s, g=g, state=state, slots=slots)\n    on_pool = checks.given(slots=slots)\n    run = choose("gsa_step", implementation, q, k, v, s, g, **on_pool)\n    return run(q, k, v, s, g, state, scale=scale, **on_pool)'),
)
sub('jla/mesa_net.py',
 ("    state: MesaState,\n    *,\n    cg_steps: int = 30,\n","    state: MesaState,\n    *,\n    cg_steps: int = 30,\n    slots: Slots | None = None,\n"),
 ("      cg_steps: as in `mesa_net`; it need not be the same.\n      implementation", "      cg_steps: as in `mesa_net`; it need not be the same.\n"+SLOTS_DOC.format(pool="[R, H, K, K] and [R, H, K, V]").replace("`state[slots[i]]`","the state in row `slots[i]`")+"      implementation"),
 ("and the new `MesaState`.\n\n    Raises:\n      TypeError, ValueError, NotImplementedError: as `mesa_net`.",
  "and the new `MesaState`; with slots the whole pool.\n\n    Raises:\n      TypeError, ValueError, NotImplementedError: as `mesa_net`. ValueError: slots that are known and\n        equal, or outside -1 to R - 1."),
 ("    sizes = checks.check_axes(_AXES_OF_STEP, q=q, k=k, v=v, g=g, beta=beta, lamb=lamb, state=state)\n","    given = dict(q=q, k=k, v=v, g=g, beta=beta, lamb=lamb, state=state)\n    sizes = pools.check_axes(_AXES_OF_STEP, slots, **given)\n"),
 ('    checking.values("jla.mesa_step", q=q, k=k, v=v, g=g, beta=beta, lamb=lamb, state=state)\n    run = choose("mesa_step", implementation, q, k, v, g, beta, lamb)\n    lamb = _nan_unless_positive(lamb)\n    return run(q, k, v, g, beta, lamb, state, cg_steps=cg_steps)',
  '    checking.values("jla.mesa_step", **given, slots=slots)\n    on_pool = checks.given(slots=slots)\n    run = choose("mesa_step", implementation, q, k, v, g, beta, lamb, **on_pool)\n    lamb = _nan_unless_positive(lamb)\n    return run(q, k, v, g, beta, lamb, state, cg_steps=cg_steps, **on_pool)'),
)
sub('jla/log_linear.py',
 ("    level_scales: LevelScales,\n    state: State,\n    *,\n","    level_scales: LevelScales,\n    state: State,\n    *,\n    slots: Slots | None = None,\n"),
 ("        returned. Donate it to jit, and it is updated in place.\n      implementation","        returned. Donate it to jit, and it is updated in place.\n"+SLOTS_DOC.format(pool="[R, H, L, K, V] and so on").replace("`state[slots[i]]`","the state in row `slots[i]`")+"      implementation"),
 ("and the new state, of the kind given.\n\n    Raises:\n      TypeError, ValueError, NotImplementedError: as `log_linear_attention`. Rows whose position L\n        levels do not serve raise, or are NaN where the position is traced.",
  "and the new state, of the kind given; with slots the\n      whole pool.\n\n    Raises:\n      TypeError, ValueError, NotImplementedError: as `log_linear_attention`. Rows whose position L\n        levels do not serve raise, or are NaN where the position is traced. ValueError: slots that\n        are known and equal, or outside -1 to R - 1."),
 ("    sizes = checks.check_axes(\n        _AXES_OF_STEP, q=q, k=k, v=v, g=g, level_scales=level_scales, state=state\n    )\n","    given = dict(q=q, k=k, v=v, g=g, level_scales=level_scales, state=state)\n    sizes = pools.check_axes(_AXES_OF_STEP, slots, **given)\n"),
 ('    _check_state("state", state, sizes["L"], 1)\n    checking.values(\n        "jla.log_linear_step", q=q, k=k, v=v, g=g, level_scales=level_scales, state=state\n    )\n    run = choose("log_linear_step", implementation, q, k, v, g, level_scales)\n    return run(q, k, v, g, level_scales, state)',
  '    _check_state("state", state, sizes["L"], 1, slots)\n    checking.values("jla.log_linear_step", **given, slots=slots)\n    on_pool = checks.given(slots=slots)\n    run = choose("log_linear_step", implementation, q, k, v, g, level_scales, **on_pool)\n    return run(q, k, v, g, level_scales, state, **on_pool)'),
 ("def _check_state(name: str, state: LogLinearState | LazyLogLinearState, L: int, T: int) -> None:\n    \"\"\"Checks a state's dtypes, and, where its positions are known, that T tokens more fit.\"\"\"",
  "def _check_state(\n    name: str,\n    state: LogLinearState | LazyLogLinearState,\n    L: int,\n    T: int,\n    slots: Slots | None = None,\n) -> None:\n    \"\"\"Checks a state's dtypes, and, where its positions are known, that T tokens more fit.\"\"\""),
 ("    position = np.asarray(position)\n    if position.min() < 0:","    position = pools.row_values(position, slots)\n    if not position.size:\n        return\n    if position.min() < 0:"),
)
sub('jla/path_attention.py',
 ("    g: LogDecays | None,\n    cache: PathCache,\n    *,\n    scale: float | None = None,\n","    g: LogDecays | None,\n    cache: PathCache,\n    *,\n    scale: float | None = None,\n    slots: Slots | None = None,\n"),
 ("      scale: as in `path_attention`.\n      implementation: as in `path_attention`.\n\n    Returns:\n      The output, [B, HQ, V], of v's dtype, and the new `PathCache`.\n\n    Raises:\n      TypeError, ValueError, NotImplementedError: as `path_attention`.\n    \"\"\"\n    factor = _check_step(q, k, v, w, beta, g, cache, scale)\n    check_room(cache, 1)\n    return step(q, k, v, w, beta, g, cache, factor, implementation)",
 "      scale: as in `path_attention`.\n"+SLOTS_DOC.format(pool="[R, S, H, K] and so on").replace("`state` is","`cache` is").replace("`state[slots[i]]`","the cache in row `slots[i]`")+"      implementation: as in `path_attention`.\n\n    Returns:\n      The output, [B, HQ, V], of v's dtype, and the new `PathCache`; with slots the whole pool.\n\n    Raises:\n      TypeError, ValueError, NotImplementedError: as `path_attention`. ValueError: slots that are\n        known and equal, or outside -1 to R - 1.\n    \"\"\"\n    factor = _check_step(q, k, v, w, beta, g, cache, scale, slots)\n    check_room(cache, 1, slots=slots)\n    return step(q, k, v, w, beta, g, cache, factor, implementation, slots)"),
 ("    scale: float,\n    implementation: Implementation | None,\n) -> tuple[Outputs, PathCache]:\n    \"\"\"`path_step` on arguments that were checked, with room or not.\"\"\"\n    _check_values(\"jla.path_step\", q, k, v, w, beta, g, cache)\n    chosen = choose(\"path_step\", implementation, q, k, v, w, beta, g, cache)\n    return chosen(q, k, v, w, beta, g, cache, scale=scale)",
  "    scale: float,\n    implementation: Implementation | None,\n    slots: Slots | None = None,\n) -> tuple[Outputs, PathCache]:\n    \"\"\"`path_step` on arguments that were checked, with room or not.\"\"\"\n    _check_values(\"jla.path_step\", q, k, v, w, beta, g, cache, slots)\n    on_pool = checks.given(slots=slots)\n    chosen = choose(\"path_step\", implementation, q, k, v, w, beta, g, cache, **on_pool)\n    return chosen(q, k, v, w, beta, g, cache, scale=scale, **on_pool)"),
 ("    g: LogDecays | None,\n    cache: PathCache | None,\n) -> None:\n    arguments","    g: LogDecays | None,\n    cache: PathCache | None,\n    slots: Slots | None = None,\n) -> None:\n    arguments"),
 ("    checking.values(name, unit=\"w\", most_beta=2, **arguments)","    checking.values(name, unit=\"w\", most_beta=2, slots=slots, **arguments)"),
 ("    *,\n    set_by: str = \"the capacity of PathCache.empty\",\n","    *,\n    slots: Slots | None = None,\n    set_by: str = \"the capacity of PathCache.empty\",\n"),
 ("      tokens: how many each row will get, an integer or int32 [B].\n","      tokens: how many each row will get, an integer or int32 [B].\n      slots: of rows of a pool, or None. Those without a sequence need no room.\n"),
 ("    known = [cache.length, tokens] + ([] if segment_ids is None else [segment_ids])\n","    known = [cache.length, tokens, *checks.given(segment_ids=segment_ids, slots=slots).values()]\n"),
 ("    length, tokens = np.asarray(cache.length, np.int64), np.asarray(tokens)\n","    length, tokens = np.asarray(cache.length, np.int64), np.asarray(tokens)\n    if slots is not None:\n        rows = np.asarray(slots)\n        length = np.where(rows < 0, -tokens, length[rows])\n"),
 ("    cache: PathCache,\n    scale: float | None,\n) -> float:\n    \"\"\"Checks the arguments of a step; returns the scale.\"\"\"","    cache: PathCache,\n    scale: float | None,\n    slots: Slots | None,\n) -> float:\n    \"\"\"Checks the arguments of a step; returns the scale.\"\"\""),
 ("    sizes = checks.check_axes(_AXES_OF_STEP, q=q, k=k, v=v, w=w, beta=beta, **optional)","    sizes = pools.check_axes(_AXES_OF_STEP, slots, q=q, k=k, v=v, w=w, beta=beta, **optional)"),
)
for p in ('jla/mesa_net.py','jla/log_linear.py','jla/path_attention.py'):
    s=open(p).read()
    m=re.search(r"from jla\._core import (.*)\n", s); print(p, m.group(0))
    names=sorted(set(m.group(1).split(", "))|{"pools"})
    s=s.replace(m.group(0), "from jla._core import "+", ".join(names)+"\n")
    s=s.replace("    Sizes,\n","    Sizes,\n    Slots,\n",1)
    open(p,'w').write(s)

sub('jla/_core/checking.py',
 ("from jla._core.cache import PathCache, places\n","from jla._core import pools\nfrom jla._core.cache import PathCache, places\n"),
 ("from jla._core.types import Array, State\n","from jla._core.types import Array, Slots, State\n"),
 ("    most_beta: float | None = None,\n    **arguments","    most_beta: float | None = None,\n    slots: Slots | None = None,\n    **arguments"),
 ("      most_beta: the largest beta, or None.\n","      most_beta: the largest beta, or None.\n      slots: the rows of a pool that a step goes on from; nothing else of the pool is checked, and\n        nothing of the rows of arguments that have no sequence.\n"),
 ("    # (argument, what it must be) to where it is not, and what to show of it\n","    if slots is not None:\n        arguments = _of_live_rows(arguments, slots)\n    # (argument, what it must be) to where it is not, and what to show of it\n"),
 ("def _arrays(\n",'''def _of_live_rows(arguments: Mapping[str, Any], slots: Slots) -> dict[str, Any]:
    """The arguments of a step, zeros in rows without a sequence, and the states of its rows."""

    def rows(name: str, x: Any) -> Any:
        if name in pools.STATES:
            return pools.take(x, slots)
        if x is None or name == "lamb":  # which all rows share
            return x
        return pools.zero_unless(jnp.asarray(slots) >= 0, jnp.asarray(x))

    return {name: rows(name, x) for name, x in arguments.items()}


def _arrays(
'''))
s=open('jla/_core/pools.py').read().replace("_STATES","STATES"); open('jla/_core/pools.py','w').write(s)

for p, old, new in (
 ('jla/reference/kda.py','@functools.partial(jax.jit, static_argnames="scale")\ndef kda_step','@pools.on_rows()\n@functools.partial(jax.jit, static_argnames="scale")\ndef kda_step'),
 ('jla/reference/gsa.py','@functools.partial(jax.jit, static_argnames="scale")\ndef gsa_step','@pools.on_rows()\n@functools.partial(jax.jit, static_argnames="scale")\ndef gsa_step'),
 ('jla/reference/mesa_net.py','@functools.partial(jax.jit, static_argnames="cg_steps")\ndef mesa_step','@pools.on_rows(shared=[5])\n@functools.partial(jax.jit, static_argnames="cg_steps")\ndef mesa_step'),
 ('jla/xla/mesa_net.py','@functools.partial(jax.jit, static_argnames="cg_steps")\ndef mesa_step','@pools.on_rows(shared=[5])\n@functools.partial(jax.jit, static_argnames="cg_steps")\ndef mesa_step'),
 ('jla/reference/log_linear.py','@jax.jit\ndef log_linear_step','@pools.on_rows()\n@jax.jit\ndef log_linear_step'),
 ('jla/reference/path_attention.py','@functools.partial(jax.jit, static_argnames=("scale", "logsumexps"))\ndef path_step','@pools.on_rows()\n@functools.partial(jax.jit, static_argnames=("scale", "logsumexps"))\ndef path_step'),
 ('jla/xla/path_attention.py','@functools.partial(jax.jit, static_argnames="scale")\ndef path_step','@pools.on_rows()\n@functools.partial(jax.jit, static_argnames="scale")\ndef path_step'),
):
    sub(p,(old,new))
    s=open(p).read()
    m=re.search(r"^from jla\._core import (.*)$", s, re.M)
    if m:
        names=sorted(set(m.group(1).split(", "))|{"pools"})
        s=s.replace(m.group(0),"from jla._core import "+", ".join(names),1)
    else:
        m=re.search(r"^from jla\._core", s, re.M)
        s=s[:m.start()]+"from jla._core import pools\n"+s[m.start():]
    open(p,'w').write(s)
sub('jla/_dispatch.py',
 ('    return module.unsupported(name, *arrays, **options) or package.unsupported_device()',
  '    if "slots" in options:\n        return "its steps take no slots"\n    return module.unsupported(name, *arrays, **options) or package.unsupported_device()'))
