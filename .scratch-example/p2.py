import pathlib
p = pathlib.Path("tests/test_examples_checkpoint.py"); s = p.read_text()
a = s.index("def test_the_mesh_splits_heads_and_the_inside_of_mlps"); b = s.index("def test_correction_biases")
s = s[:a] + '''def shardings_of(mesh, key_heads):
    mixer = PaTHAttention(num_heads=4, num_key_heads=key_heads, key_dim=16)
    experts = Experts(num_experts=7, experts_per_token=2, hidden=48)
    layers = Layer(mixer, SwiGLU(48)), Layer(mixer, experts)
    shapes = from_checkpoint.shapes_of(LanguageModel(Config(300, 32, layers)))
    return from_checkpoint.shardings_of({"params": shapes}, mesh)["params"]


def test_the_mesh_splits_heads_and_the_inside_of_mlps():
    mesh = from_checkpoint.make_mesh(dict(data=2, model=4), 8)
    found = shardings_of(mesh, key_heads=1)  # which all heads share
    split = {
        "embed/embedding": ("model", "data"),
        "head/kernel": ("data", "model"),
        "block_0/mixer/q_proj/kernel": ("data", "model", None),
        "block_0/mixer/k_proj/kernel": ("data", None, None),
        "block_0/mixer/o_proj/kernel": ("model", None, "data"),
        "block_0/mlp/down/kernel": ("model", "data"),
        "block_1/mlp/gate": (None, "data", "model"),
        "block_1/mlp/down": (None, "model", "data"),
        "block_1/mixer_norm/scale": (None,),
    }
    for path, spec in split.items():
        at = functools.reduce(lambda tree, name: tree[name], path.split("/"), found)
        assert at.spec == jax.P(*spec), path
    words = "params/block_0/mixer/k_.*/kernel has key_heads = 2, .* of the 4 devices of model in"
    with pytest.raises(InputError, match=words):
        shardings_of(mesh, key_heads=2)


''' + s[b:]
p.write_text(s)
p = pathlib.Path("tests/test_examples_mesh.py"); s = p.read_text()
s = s.replace('''        ("--mesh seq=4,data=1 --mixer path", "cannot train this model on the mesh H 4"),
''', '''        (
            "--mesh data=4 --width 34",
            "cannot train this model on the mesh params/blocks/mixer/b_proj/kernel has embed = 34 "
            "must be a multiple of the 4 devices of data",
        ),
''')
p.write_text(s)
