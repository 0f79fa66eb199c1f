"""What MkDocs is told beyond mkdocs.yml: pages that lie elsewhere, and links that leave the site.

READMEs of recipes and the tour are read on a code host as well, where they lie; the site shows them
as pages. Links to files that the site has not become the path of the file.
"""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# [text](target), not an image; the target without its anchor apart.
LINK = re.compile(r'(?<!!)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)')
FENCE = re.compile(r'^(```.*?^```)$', re.MULTILINE | re.DOTALL)


def sources() -> dict[str, str]:
    """Path of every page that lies elsewhere, from the root, by its place in the site."""
    pages = {
        f'recipes/{path.parent.name}.md': path.relative_to(ROOT).as_posix()
        for path in sorted(ROOT.glob('configs/*/README.md'))
    }
    return {**pages, 'tour.md': 'docs/tour.ipynb'}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere."""
    for place, source in sources().items():
        text = (ROOT / source).read_text(encoding='utf-8')
        content = notebook_text(text) if source.endswith('.ipynb') else text
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to pages of the site, and name the file where there is none."""
    places = {source: place for place, source in sources().items()}
    here = page.file.src_uri
    origin = sources().get(here, f'docs/{here}')

    def point(match: re.Match) -> str:
        text, target, anchor = match[1], match[2], match[3] or ''
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        place = next((p for s, p in places.items() if path in (s, posixpath.dirname(s))), None)
        if path == 'docs/tour.ipynb' or (place and path.startswith('configs/')):
            pass
        elif path.startswith('docs/') and files.get_file_from_path(path.removeprefix('docs/')):
            place = path.removeprefix('docs/')
        elif path.startswith('docs/') and (ROOT / path).is_dir():
            place = f'{path.removeprefix("docs/")}/README.md'
        elif (ROOT / path).exists():
            return text if path in text else f'{text} (`{path}`)' if ' ' in text else text
        else:
            return match[0]  # and MkDocs complains
        return f'[{text}]({posixpath.relpath(place, posixpath.dirname(here) or ".")}{anchor})'

    parts = FENCE.split(markdown)
    return ''.join(p if p.startswith('```') else LINK.sub(point, p) for p in parts)


def notebook_text(text: str) -> str:
    """A notebook as Markdown: its text, and its code as blocks."""
    parts = []
    for cell in json.loads(text)['cells']:
        source = ''.join(cell['source'])
        parts.append(source if cell['cell_type'] == 'markdown' else f'```python\n{source}\n```')
    return '\n\n'.join(parts) + '\n'
