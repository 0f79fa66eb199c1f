"""The notebook runs, from its first cell to its last."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).resolve().parents[2] / 'docs'


def test_tour_runs(tmp_path, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setenv('MPLBACKEND', 'module://matplotlib_inline.backend_inline')
    notebook = nbformat.read(DOCS / 'tour.ipynb', as_version=4)
    assert not any(cell.get('outputs') for cell in notebook.cells), 'commit it without outputs'
    client = NotebookClient(notebook, timeout=300, resources={'metadata': {'path': str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', ())]
    pictures = [o for o in outputs if 'image/png' in o.get('data', {})]
    assert len(pictures) == 4
    printed = ''.join(o['text'] for o in outputs if o.output_type == 'stream')
    assert 'GreenMIM' in printed and 'largest difference' in printed
    # Nothing is left where it ran.
    assert list(tmp_path.iterdir()) == []
