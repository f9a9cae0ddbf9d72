import pathlib
p = pathlib.Path("docs/scale.md"); s = p.read_text()
s = s.replace('''- Parameters and Adam's moments are split over "data" where an axis allows it. Each block gathers its own inside the
  scan over blocks, and again in the backward pass; the gather's transpose leaves each device the sum of its part.
''', '''- Parameters and Adam's moments are split over "data" and "model" by `jla.linen.logical_axes` and the rules above. An
  axis that its devices do not divide is an error, which names the parameter; one key head for all is on all devices.
  Each block gathers its own parameters inside the scan over blocks, and again in the backward pass; the gather's
  transpose leaves each device the sum of its part.
''')
p.write_text(s)
