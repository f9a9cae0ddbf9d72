import re
exec("\n".join(re.findall(r"```python\n(.*?)```",open('docs/pools.md').read(),re.S)))
print(y.shape)
