"""Docstrings, which are plain text for a terminal, as Markdown for the site's reference."""

import re
import textwrap

import griffe

HEADING = re.compile(r"^([A-Z][\w ,`()]*):$")
RULE = re.compile(r"^=+(?: +=+)+$")
# Shapes, pages and stars, where they stand in no code; code is matched first, so that it stays.
INLINE = re.compile(r"``?[^`]+``?|(?<!\w)(\[[\w., +*/()-]+\])|\bdocs/([\w/]+\.md)\b|\*")


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of all objects, and adds the fields of modules and dataclasses."""

    def on_package(self, *, pkg, loader, **_):
        for thing in objects(pkg):
            if not thing.docstring:
                continue
            text = markdown(thing.docstring.value)
            if thing.is_class and (fields := list(fields_of(thing))):
                code = "\n".join(f"    {field}," for field in fields)
                text = f"```python\n{thing.name}(\n{code}\n)\n```\n\n{text}"
            thing.docstring.value = text


def objects(thing):
    for member in thing.members.values():
        if member.is_alias:
            continue
        yield member
        if not member.is_function:
            yield from objects(member)


def fields_of(thing):
    """`name: type = default` of each field of a class, those of its bases in jla first."""
    found = {}
    for base in reversed([thing, *thing.mro()]):
        for name, member in base.attributes.items():
            if member.annotation is None or name.startswith("_"):
                continue
            default = "" if member.value is None else f" = {member.value}"
            found[name] = f"{name}: {member.annotation}{default}"
    return found.values()


def markdown(text):
    parts, lines = [], text.splitlines()
    while lines:
        line = lines.pop(0)
        heading = HEADING.match(line)
        if heading and lines and re.match(r"  \S", lines[0]):
            block = []
            while lines and (lines[0].startswith("  ") or (not lines[0] and below(lines))):
                block.append(lines.pop(0)[2:])
            parts.append(section(heading[1], "\n".join(block)))
        elif RULE.match(line):
            end = next(i for i, other in enumerate(lines) if other == line)
            parts.append(table(line, lines[:end]))
            del lines[: end + 1]
        else:
            parts.append(line if line.startswith("    ") else inline(line))
    return "\n".join(parts)


def below(lines):
    """Whether the section continues behind an empty line."""
    return len(lines) > 1 and lines[1].startswith("  ")


def section(name, block):
    if name == "Example":
        return f"\n**{name}**\n\n```python\n{block}\n```\n"
    if name in ("Returns", "Yields"):
        return f"\n**{name}**\n\n{inline(textwrap.dedent(block))}\n"
    items = re.sub(r"^(?=\S)", "\n", block, flags=re.M).split("\n\n")
    listed = []
    for item in filter(None, (x.strip("\n") for x in items)):
        names, _, rest = item.partition(": ")
        rest = " ".join(line.strip() for line in rest.splitlines())
        listed.append(f"- `{names}`: {inline(rest)}")
    return f"\n**{name}**\n\n" + "\n".join(listed) + "\n"


def table(rule, rows):
    """A table of Markdown; rows that begin behind the first two columns continue the one above."""
    starts = [found.start() for found in re.finditer("=+", rule)]
    ends = [*starts[1:], None]
    cut = [
        [row[a:b].strip() for a, b in zip(starts, ends, strict=True)] for row in rows if row.strip()
    ]
    made = []
    for row in cut:
        if made and not any(row[:-1]):
            made[-1][-1] += " " + row[-1]
        else:
            made.append(row)
    lines = ["| " + " | ".join(inline(x) for x in row) + " |" for row in made]
    return "\n".join(["", "|" + "   |" * len(starts), "|" + " --- |" * len(starts), *lines, ""])


def inline(text):
    def replaced(found):
        shape, page = found[1], found[2]
        if shape:
            return f"`{shape}`"
        if page:
            return f"[docs/{page}](../{page})"  # from docs/api; mkdocs looks for it
        return r"\*" if found[0] == "*" else found[0]

    return INLINE.sub(replaced, text)
