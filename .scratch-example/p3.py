import pathlib
p = pathlib.Path("examples/devices.py"); s = p.read_text()
s = s.replace('''            self.shardings = shardings_of(state, mesh)
''', '''            # Parameters first: these are named, not their moments, if they do not fit.
            self.shardings = {x: shardings_of(state[x], mesh) for x in ("params", "moments")}
''')
s = s.replace('''                    f"{joined(path)} has {name}''','''                    f"parameter {joined(path)} has {name}''')
s = s.replace("    \"\"\"The shardings of parameters, or of a state with moments, which lie as their parameters.", "    \"\"\"The shardings of parameters, or of their moments, which lie as they do.")
p.write_text(s)
p = pathlib.Path("tests/test_examples_mesh.py"); s = p.read_text()
s = s.replace("mesh params/blocks/mixer/b_proj/kernel", "mesh parameter blocks/mixer/b_proj/kernel")
p.write_text(s)
p = pathlib.Path("tests/test_examples_checkpoint.py"); s = p.read_text()
s = s.replace('''    return from_checkpoint.shardings_of({"params": shapes}, mesh)["params"]
''', '''    return from_checkpoint.shardings_of(shapes, mesh)
''')
s = s.replace('"params/block_0/mixer/k_.*/kernel has', '"parameter block_0/mixer/k_.*/kernel has')
s = s.replace('''import pathlib
import sys
import types
''', '''import functools
import pathlib
import sys
import types
''')
s = s.replace('''import jla.hub

sys.path''', '''import jla.hub
from jla.linen import PaTHAttention
from jla.models import Config, Experts, LanguageModel, Layer, SwiGLU

sys.path''')
s = s.replace('''import from_checkpoint

pytestmark''', '''import from_checkpoint
from command_line import InputError

pytestmark''')
p.write_text(s)
