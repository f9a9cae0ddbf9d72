import pathlib
exec(open(".scratch-example/p7.py").read().split("edit(\"benchmarks/measure.py\"")[0])
edit("benchmarks/language_model.py",
('''    step = jax.jit(
        functools.partial(train_step.__wrapped__, model=model, optimizer=optimizer),
        donate_argnums=0,
    )
    return everywhere, lambda windows: (jax.device_put(windows, split),), step
''', '''    lower = functools.partial(train_step.lower, model=model, optimizer=optimizer)
    return everywhere, lambda windows: (jax.device_put(windows, split),), lower
'''),
('''    return spread.shardings, spread.inputs_and_targets, spread.step
''','''    return spread.shardings, spread.inputs_and_targets, spread.step.lower
'''),
('''    """Data parallelism by shardings alone. Returns where the state lies, a function of windows that
    makes a step's arrays, and the jitted step of state and arrays."""
''', '''    """Data parallelism by shardings alone. Returns where the state lies, a function of windows that
    makes a step's arrays, and one of state and arrays that lowers the step."""
'''),
("    places, arrays, step = arrange(", "    places, arrays, lower = arrange("),
("    lowered = step.lower(state, *batch(1))", "    lowered = lower(state, *batch(1))"),
)
edit("benchmarks/mechanisms.py", ('''    In the group "context" T are the tokens of each device, but for the measure "layer", whose T are
    those of all. D is the dimension of keys and values, M the number of slots, HQ that of query heads (H if
    None), HK that of key heads and S that of cached tokens, of a mechanism that has them.
''', '''    D is the dimension of keys and values, M the number of slots, HQ that of query heads (H if
    None), HK that of key heads and S that of cached tokens, of a mechanism that has them. In the
    group "context" T are the tokens of each device; for the measure "layer", those of all.
'''))
