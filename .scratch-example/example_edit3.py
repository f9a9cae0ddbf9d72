exec(open('/tmp/example_edit.py').read().split("SLOTS_DOC")[0])
sub('jla/linen/path_attention.py',
 ('''slots=live, set_by=_SET_BY)''','''set_by=_SET_BY)'''),
 ('''            options = dict(scale=arrays[1].shape[2] ** -0.5, implementation=self.implementation)
            return _step_on_pool(*arrays, pool, slots, **options)
''','''            scale = arrays[1].shape[2] ** -0.5
            return step(*arrays, pool, scale, self.implementation, slots)
'''),
 ('''        step = None if tokens.slots is None else on_pool
        return self.finish(self.mix(run, step, arrays, cache), tokens)
''','''        one = None if tokens.slots is None else on_pool
        return self.finish(self.mix(run, one, arrays, cache), tokens)
'''))
sub('jla/linen/mixer.py',
 ('''step(*(x[:, 0] for x in arrays), cache.whole, **slots)''','''step(*one, cache.whole, **slots)'''),
 ('''            slots = {} if cache.slots is None''','''            one = (None if x is None else x[:, 0] for x in arrays)
            slots = {} if cache.slots is None'''))
sub('jla/linen/_padding.py',
 ('''    token is padding has nothing to say to its sequence, and counts as one without.
''' if False else '''    slots = jnp.asarray(slots)
    if mask is not None and inputs.shape[1] == 1:
        slots, mask = jnp.where(mask[:, 0], slots, -1), None
    return pools.zero_unless(slots >= 0, jnp.asarray(inputs)), mask, slots
''','''    slots = jnp.asarray(slots)
    if mask is not None and inputs.shape[1] == 1:
        slots, mask = jnp.where(mask[:, 0], slots, -1), None
    if mask is not None:
        mask = mask & (slots >= 0)[:, None]
    return pools.zero_unless(slots >= 0, jnp.asarray(inputs)), mask, slots
'''))
# models
sub('jla/models/attention.py',
 ("from jla._core import checks\n","from jla._core import checks, pools\n"),
 ("from jla.linen._padding import arrange\n",""),
 ("from jla.linen.mixer import Cache, Tokens\n","from jla.linen.mixer import Cache, arranged\n"),
 ('''        segment_ids: jax.Array | None = None,
    ) -> jax.Array:''','''        segment_ids: jax.Array | None = None,
        slots: jax.Array | None = None,
    ) -> jax.Array:'''),
 ('''        H, HK, K = self._sizes(D)
        tokens = Tokens(*arrange(inputs, mask, segment_ids))
''','''        H, HK, K = self._sizes(D)
        _arguments.check_slots(self, slots, inputs)
        tokens = arranged(inputs, mask, segment_ids, slots)
'''),
 ("cache = self._cache(v) if self.decode else None","cache = self._cache(v, tokens.slots) if self.decode else None"),
 ("    def _cache(self, v):","    def _cache(self, v, slots):"),
 ("_arguments.check_cache(self, **entries)","_arguments.check_cache(self, slots, **entries)"),
 ("        return Cache(tuple, variables)\n","        return Cache(lambda **state: state, variables, slots)\n"),
 ('''            before = tuple(cache.variables[name].value for name in ("length", "start"))
''','''            held = cache.state
            before = held["length"], held["start"]
'''),
 ('''        length = cache.variables["length"].value
        added''','''        length = held["length"]
        added'''),
 ('''        S = cache.variables["cached_key"].value.shape[2]
''','''        S = held["cached_key"].shape[2]
'''),
 ('''            append(cache.variables[name].value, new, length, tokens.real)
            for name, new in (("cached_key", k), ("cached_value", v))
        )
        cache.variables["cached_key"].value = keys
        cache.variables["cached_value"].value = values
        cache.variables["length"].value = length + added
        cache.variables["start"].value = start
''','''            append(held[name], new, length, tokens.real)
            for name, new in (("cached_key", k), ("cached_value", v))
        )
        new = dict(cached_key=keys, cached_value=values, length=length + added, start=start)
        cache.update([new[name] for name in cache.variables])
'''),
)
sub('jla/models/latent_attention.py',
 ("from jla.linen._padding import arrange\n",""),
 ("from jla.linen.mixer import Tokens\n","from jla.linen.mixer import Cache, arranged\n"),
 ('''        segment_ids: jax.Array | None = None,
    ) -> jax.Array:''','''        segment_ids: jax.Array | None = None,
        slots: jax.Array | None = None,
    ) -> jax.Array:'''),
 ('''        tokens = Tokens(*arrange(inputs, mask, segment_ids))
''','''        _arguments.check_slots(self, slots, inputs)
        tokens = arranged(inputs, mask, segment_ids, slots)
'''),
 ("cache = self._cache(latent, shared)","cache = self._cache(latent, shared, tokens.slots)"),
 ('''        before = None if cache is None else tuple(cache[name].value for name in ROWS)
''','''        held = {} if cache is None else cache.state
        before = None if cache is None else tuple(held[name] for name in ROWS)
'''),
 ('''        length = cache["length"].value
        added''','''        length = held["length"]
        added'''),
 ('''cache["latent"].value.shape[1]''','''held["latent"].shape[1]'''),
 ('''            x = append(cache[name].value[:, None], new[:, :, None], length, tokens.real)[:, 0]
            cache[name].value = x
            return''','''            x = append(held[name][:, None], new[:, :, None], length, tokens.real)[:, 0]
            held[name] = x
            return'''),
 ('''        cache["length"].value, cache["start"].value = length + added, start
''','''        cache.update([*held.values()][:2] + [length + added, start])
'''),
 ("    def _cache(self, latent, shared):","    def _cache(self, latent, shared, slots):"),
 ('''        """The variables of the cache by name; None without `decode`."""''','''        """The cache, its state by name; None without `decode`."""'''),
 ("_arguments.check_cache(self, **entries)","_arguments.check_cache(self, slots, **entries)"),
 ('''        return {
            name: self.variable("cache", name, jnp.zeros, *entry) for name, entry in entries.items()
        }
''','''        variables = {
            name: self.variable("cache", name, jnp.zeros, *entry) for name, entry in entries.items()
        }
        return Cache(lambda **state: state, variables, slots)
'''),
)
