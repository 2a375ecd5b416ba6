"""A hook of mkdocs: pages that stand outside of docs/ become pages of the site too, and links to them lead there.

On GitHub `../CONTRIBUTING.md` is right in a page of docs/, and in the site `CONTRIBUTING.md` is.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "benchmarks/NOTES.md", "benchmarks/RESULTS.md")


def on_files(files, config):
    """Adds the pages of `OUTSIDE`."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Makes the links of a page those of the site.

    The site's top folder is docs/ and the repository's at once: from a page of docs/ one step up is no step, and a
    page from outside finds docs/ beside itself.
    """
    if page.file.src_uri in OUTSIDE:
        return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)
    return re.sub(r"\]\(\.\./", "](", markdown)
