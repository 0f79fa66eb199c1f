"""The site builds without a warning, and its links lead to pages."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')
    result = subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(folder)],
        cwd=ROOT,
        env=dict(os.environ, NO_MKDOCS_2_WARNING='1'),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert 'WARNING' not in result.stderr
    return folder


def test_every_page_is_built(site):
    pages = {
        path.relative_to(ROOT / 'docs').with_suffix('.html') for path in ROOT.glob('docs/**/*.md')
    }
    pages = {path.with_name('index.html') if path.stem == 'README' else path for path in pages}
    recipes = {
        Path('recipes', path.parent.name).with_suffix('.html')
        for path in ROOT.glob('configs/*/README.md')
    }
    built = {path.relative_to(site) for path in site.rglob('*.html')}
    assert pages | recipes | {Path('tour.html')} <= built
    assert not list(site.rglob('hooks*'))


def test_links_of_recipes_lead_to_pages_and_files_to_none(site):
    text = (site / 'recipes.html').read_text(encoding='utf-8')
    assert 'href="recipes/greenmim.html#memory"' in text
    # The site has no recipes, and no tests.
    content = text.partition('<article')[2].partition('</article')[0]
    assert not re.search(r'href="[^"]*\.py"', content)
    assert 'greenmim_swin-base-w7_8xb256-amp-coslr-800e_in1k' in content


def test_pages_fetch_nothing_from_elsewhere(site):
    for page in site.rglob('*.html'):
        text = page.read_text(encoding='utf-8')
        assert not re.findall(r'<(?:script|img)[^>]+src="https?:', text), page
        assert not re.findall(
            r'<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+href="https?:', text
        ), page
