"""What the site's pages need beside what GitHub shows: mkdocs.yml names this file.

Pages stay plain Markdown that GitHub shows as well. Lists are written as CommonMark wants them, and
Python-Markdown wants more indentation; links to files of the repository lead to GitHub, unless the
file is a page here; pictures follow the site's switch for dark; formulas become MathML, which
browsers show without a script.
"""

import html
import os
import pathlib
import posixpath
import re
import sys

import latex2mathml.converter
from mkdocs.structure.files import File

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import notebook

ROOT = pathlib.Path(__file__).parents[2]
REPOSITORY = "https://github.com/jla-authors/jla"
# Files of the repository that are pages, and their places here.
PAGES = {
    "docs/tutorial.ipynb": "tutorial.md",
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
LINK = re.compile(r"(?<=\]\()([^()\s#]*)((?:#[^()\s]*)?)(?=\))")
REFERENCE = re.compile(r"^(\[[^\]]+\]: )(\S+?)((?:#\S*)?)$", re.M)
FENCE = re.compile(r"^ *(```+|~~~+)")
ITEM = re.compile(r"( *)([-*+]|\d+[.)])( +)(?=\S)")
PICTURE = re.compile(r"^<picture>.*?^</picture>$", re.M | re.S)


def on_files(files, config):
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_read_source(page, config):
    if page.file.abs_src_path.endswith(".ipynb"):
        return notebook.markdown(notebook.read())
    return None  # mkdocs reads it


def on_page_markdown(markdown, page, config, files):
    source = path_in_repository(page.file)
    text = PICTURE.sub(lambda found: pictures(found[0]), markdown)
    return indented(outside_code(text, lambda part: linked(part, source, page.file, files)))


def on_page_content(content, page, config, files):
    return re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>',
        lambda found: mathml(html.unescape(found[2]), found[1] == "div"),
        content,
        flags=re.S,
    )


def path_in_repository(file):
    return os.path.relpath(file.abs_src_path, ROOT)


def linked(text, source, file, files):
    """The text with links to files of the repository as links of the site, or to GitHub."""

    def link(path, anchor):
        absolute = path.startswith(f"{REPOSITORY}/blob/main/")
        if not path or (re.match(r"\w+:", path) and not absolute):
            return path + anchor
        if absolute:
            inside = path.removeprefix(f"{REPOSITORY}/blob/main/")
        else:
            inside = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        page = PAGES.get(inside, inside.removeprefix("docs/"))
        if files.get_file_from_path(page) and (inside in PAGES or inside.startswith("docs/")):
            return posixpath.relpath(page, posixpath.dirname(file.src_uri) or ".") + anchor
        if (ROOT / inside).exists():
            kind = "tree" if (ROOT / inside).is_dir() else "blob"
            return f"{REPOSITORY}/{kind}/main/{inside}{anchor}"
        return path + anchor  # mkdocs reports it

    text = LINK.sub(lambda found: link(found[1], found[2]), text)
    return REFERENCE.sub(lambda found: found[1] + link(found[2], found[3]), text)


def outside_code(text, change):
    """Changes what is in no fenced block."""
    parts = re.split(r"(^ *```.*?^ *```$)", text, flags=re.M | re.S)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def pictures(block):
    """Two images of Material's, of which it shows one."""
    (dark,) = re.findall(r'srcset="([^"]+)"', block)
    ((alt, light),) = re.findall(r'<img alt="([^"]+)" src="([^"]+)"', block)
    return f"![{alt}]({light}#only-light)\n![{alt}]({dark}#only-dark)"


def mathml(formula, display):
    formula = formula.replace("{aligned}", "{align*}")  # what latex2mathml knows of the two
    made = latex2mathml.converter.convert(formula, display="block" if display else "inline")
    return f'<div class="formula">{made}</div>' if display else made


def indented(text):
    """The text with lists indented by four for each level, and an empty line before each list.

    CommonMark's rule: what is indented as far as an item's text belongs to the item.
    """
    lines, fence, blank = [], None, True
    columns, loose = [], False  # where the open items' texts begin; whether lines there are empty
    for line in text.split("\n"):
        margin = len(line) - len(line.lstrip(" "))
        if not line.strip():
            lines.append("")
            blank = True
            continue
        if fence is not None:
            ended = line.strip().strip(fence[0]) == "" and len(line.strip()) >= len(fence)
            fence = None if ended else fence
        else:
            item = is_item(line, blank, columns)
            loose = bool(columns) and (loose or blank)
            lines += [""] if item and not blank and (loose or not columns) else []
            while columns and margin < columns[-1] and (blank or item or FENCE.match(line)):
                columns.pop()
            if item:
                lines.append(" " * (4 * len(columns)) + f"{item[2]:<4}{line[item.end() :]}")
                columns.append(item.end())
                blank = False
                continue
            opened = FENCE.match(line)
            fence = opened[1] if opened else None
        begin = min(margin, columns[-1] if columns else 0)
        lines.append(" " * (4 * len(columns)) + line[begin:])
        blank = False
    return "\n".join(lines)


def is_item(line, blank, columns):
    """The match of an item's marker, or None: code, or the middle of a paragraph."""
    item = ITEM.match(line)
    if not item:
        return None
    outer = [column for column in columns if column <= len(item[1])]
    if len(item[1]) - (outer[-1] if outer else 0) >= 4:
        return None
    interrupts = item[2] in ("-", "*", "+", "1.", "1)")
    return item if blank or columns or interrupts else None
