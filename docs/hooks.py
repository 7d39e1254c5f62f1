"""Make the site's home of README.md, so that there is one copy of it."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent


def on_files(files, config):
    """Add README.md as the page `index.md`, with its links made relative to docs/."""
    text = re.sub(r"\]\(docs/", "](", (ROOT / "README.md").read_text())
    text = re.sub(r"`?docs/([a-z_]+\.md)`?\]", r"\1]", text)
    text = re.sub(r"\[([A-Z]+\.md)\]\(\1\)", r"`\1`", text)  # files that the site does not have
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Name a file outside of docs/ in the place of a link to it: the site does not have the file."""
    return re.sub(r"\[[^\]]+\]\(\.\./([^)]+)\)", r"`\1`", markdown)
