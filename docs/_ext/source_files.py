"""A page for every file outside of docs/ that a page links to, and for what the reference names.

On GitHub `../gspo_jax/batch.py` leads to the file; on the site to files/gspo_jax/batch.py.html:
its text with line numbers, whatever the repository's address is, in the version that was built.
Of a notebook it is its cells, beside the file. A linked page of HTML in docs/ lies where it lay.
"""

import inspect
import posixpath
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path

from docutils import nodes
from notebooks import as_html
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.transforms import SphinxTransform


class LinkFiles(SphinxTransform):
    """Links to files and directories, and a [source] at every documented name."""

    default_priority = 5  # before references are resolved

    def apply(self, **kwargs):
        root, docname = self.app.config.source_files_root, self.env.docname
        if not hasattr(self.env, "linked_files"):
            self.env.linked_files = {}
        self.linked = self.env.linked_files[docname] = set()
        links = [
            *self.document.findall(addnodes.download_reference),
            *self.document.findall(addnodes.pending_xref),
        ]
        for node in links:
            if node.get("reftype") != "myst" or node["reftarget"] in self.env.found_docs:
                continue
            place = Path(self.env.srcdir, docname).parent / node["reftarget"].partition("#")[0]
            if node.get("refdomain") == "doc":  # Markdown; told as a path without its suffix
                place = Path(f"{node['reftarget']}.md")
            if place.resolve().is_relative_to(root) and place.exists():
                target = self.target(place.resolve())
                link = nodes.reference("", "", *node.children, internal=True, refuri=target)
                node.replace_self(link)
        for signature in self.document.findall(addnodes.desc_signature):
            if found := place_of(signature.get("module"), signature.get("fullname"), root):
                path, line = found
                link = nodes.reference(
                    "", "", internal=True, refuri=f"{self.target(path)}#L-{line}"
                )
                link += nodes.inline("", "[source]", classes=["viewcode-link"])
                signature += link

    def target(self, path: Path) -> str:
        """Where this page's link to `path` leads; what has to be there for it is remembered."""
        docs, up = Path(self.env.srcdir), "../" * self.env.docname.count("/")
        if path.is_relative_to(docs) and path.suffix == ".html":
            self.linked.add(path)
            return up + path.relative_to(docs).as_posix()
        self.linked.add(path)
        return f"{up}{page_of(path, self.app.config.source_files_root)}.html"


def page_of(path: Path, root: Path) -> str:
    name = path.relative_to(root).as_posix()
    return f"files/{name}/index" if path.is_dir() else f"files/{name}"


def place_of(module: str | None, fullname: str | None, root: Path) -> tuple[Path, int] | None:
    """File and line of a documented function or class; None for data."""
    thing = sys.modules.get(module or "")
    for part in (fullname or "").split("."):
        thing = getattr(thing, part, None)
    try:
        path = Path(inspect.getsourcefile(inspect.unwrap(thing))).resolve()
        line = inspect.getsourcelines(inspect.unwrap(thing))[1]
    except (TypeError, OSError):
        return None
    return (path, line) if path.is_relative_to(root) else None


def pages(app):
    """(name, context, template) of each, as Sphinx wants them."""
    root = app.config.source_files_root
    linked = set().union(*getattr(app.env, "linked_files", {}).values())
    inside = {p for p in linked if p.is_relative_to(app.srcdir) and p.suffix == ".html"}
    for path in inside:
        target = Path(app.outdir, path.relative_to(app.srcdir))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for path in linked:
        if path.suffix == ".ipynb":
            copied = Path(app.outdir, page_of(path, root))
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
    todo, done = sorted(linked - inside), set()
    while todo:
        path = todo.pop()
        if path in done:
            continue
        done.add(path)
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            members = tracked(path)
            todo += members
            body = listing(path, members, root)
        elif path.suffix == ".ipynb":
            body, more = notebook(path, app)
            todo += more
        else:
            body = source(path)
        title = "" if path.suffix == ".ipynb" else f"<h1>{escape(name)}</h1>"
        context = {"title": name, "body": title + body, "parents": []}
        yield page_of(path, root), context, "page.html"


def notebook(path: Path, app) -> tuple[str, list[Path]]:
    """Its cells, and the files that they link to."""
    root, found = app.config.source_files_root, []
    here = posixpath.dirname(page_of(path, root))

    def lead(place: Path) -> str:
        inside = place.is_relative_to(app.srcdir) and place.suffix == ".md"
        if inside:
            name = place.relative_to(app.srcdir).with_suffix("").as_posix()
        else:
            found.append(place)
            name = page_of(place, root)
        return f"{posixpath.relpath(name, here)}.html"

    there = f'<p><a href="{path.name}" download>{path.name}</a>, to run it yourself:</p>'
    return there + as_html(path, lead), found


def source(path: Path) -> str:
    """The text with its colours, every line with an anchor."""
    text = path.read_text(encoding="utf-8")
    try:
        lexer = get_lexer_for_filename(path.name)
    except ClassNotFound:
        lexer = TextLexer()
    return highlight(text, lexer, HtmlFormatter(lineanchors="L", linenos="inline"))


def listing(directory: Path, members: list[Path], root: Path) -> str:
    here = posixpath.dirname(page_of(directory, root))
    rows = [
        f'<li><a href="{posixpath.relpath(page_of(p, root), here)}.html"><code>'
        f"{escape(p.relative_to(directory).as_posix())}</code></a></li>"
        for p in members
    ]
    return f"<ul>{''.join(rows)}</ul>"


def tracked(directory: Path) -> list[Path]:
    """The texts in it that belong to the repository; without git, all."""
    command = ["git", "-C", str(directory), "ls-files", "-z"]
    done = subprocess.run(command, capture_output=True, text=True)
    names = done.stdout.split("\0") if done.returncode == 0 else []
    found = [directory / name for name in names if name] or sorted(directory.rglob("*.*"))
    return [p for p in found if p.suffix in (".py", ".md", ".yaml", ".json", ".sh", ".txt")]


def forget(app, env, docname):
    getattr(env, "linked_files", {}).pop(docname, None)


def setup(app):
    app.add_config_value("source_files_root", None, "env")
    app.add_transform(LinkFiles)
    app.connect("html-collect-pages", pages)
    app.connect("env-purge-doc", forget)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
