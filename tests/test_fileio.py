"""Files and folders that are written whole or not at all."""

import os

import pytest

from greenmim_mm.fileio import atomic_folder, atomic_path, check_apart, check_destination


@pytest.mark.parametrize('links', [True, False])
def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch, links):
    def unsupported(*args):
        raise OSError('no links here')

    if not links:
        monkeypatch.setattr(os, 'link', unsupported)
    dst = tmp_path / 'x.pth'
    with pytest.raises(FileExistsError, match='--force'):
        with atomic_path(dst) as temporary:
            temporary.write_text('late')
            dst.write_text('early')
    assert dst.read_text() == 'early'
    with atomic_path(dst, force=True) as temporary:
        temporary.write_text('late')
    with atomic_path(tmp_path / 'y.pth') as temporary:
        temporary.write_text('new')
    assert dst.read_text() == 'late'
    assert {path.name for path in tmp_path.iterdir()} == {'x.pth', 'y.pth'}


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    dst = tmp_path / 'hf'
    with pytest.raises(FileExistsError, match='--force'):
        with atomic_folder(dst) as temporary:
            (temporary / 'config.json').write_text('late')
            dst.mkdir()
            (dst / 'config.json').write_text('early')
    assert (dst / 'config.json').read_text() == 'early'
    assert [path.name for path in tmp_path.iterdir()] == ['hf']


def test_rights_follow_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        with atomic_path(tmp_path / 'x') as temporary:
            temporary.write_text('new')
        with atomic_folder(tmp_path / 'folder'):
            pass
    finally:
        os.umask(mask)
    assert (tmp_path / 'x').stat().st_mode & 0o777 == 0o640
    assert (tmp_path / 'folder').stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize('force', [False, True])
def test_a_failure_leaves_everything_as_it_was(tmp_path, force):
    file, folder = tmp_path / 'x', tmp_path / 'folder'
    if force:
        file.write_text('old')
        folder.mkdir()
        (folder / 'part').write_text('old')
    before = {path: path.read_text() for path in tmp_path.rglob('*') if path.is_file()}
    for atomic, path in ((atomic_path, file), (atomic_folder, folder)):
        options = dict(check_replaced=lambda path: None) if path == folder else {}
        with pytest.raises(KeyboardInterrupt):
            with atomic(path, force, **options) as temporary:
                (temporary / 'part' if path == folder else temporary).write_text('half')
                raise KeyboardInterrupt
    found = {path: path.read_text() for path in tmp_path.rglob('*') if path.is_file()}
    assert found == before
    assert {path.name for path in tmp_path.iterdir()} == ({'x', 'folder'} if force else set())


def test_what_a_folder_holds_decides_whether_it_is_replaced(tmp_path):
    def check(path):
        if not (path / 'mine').exists():
            raise FileExistsError(f'{path} is not mine')

    folder = tmp_path / 'folder'
    for name in ('mine', 'new'):
        with atomic_folder(folder, name == 'new', check) as temporary:
            (temporary / name).touch()
    assert [path.name for path in folder.iterdir()] == ['new']
    for options, message in (
        (dict(force=True, check_replaced=check), 'is not mine'),
        (dict(force=True), 'holds other things, e.g. new'),
        (dict(check_replaced=lambda path: None), 'not empty.*--force'),
    ):
        with pytest.raises(FileExistsError, match=message):
            with atomic_folder(folder, **options):
                pass
    (tmp_path / 'file').touch()
    with pytest.raises(FileExistsError, match='is a file'):
        with atomic_folder(tmp_path / 'file', True, lambda path: None):
            pass
    assert [path.name for path in folder.iterdir()] == ['new']


def test_destinations(tmp_path):
    with pytest.raises(FileExistsError, match='is a folder'):
        check_destination(tmp_path, force=True)
    with pytest.raises(FileNotFoundError, match='none does not exist'):
        check_destination(tmp_path / 'none' / 'x')
    check_apart(tmp_path / 'a', tmp_path / 'ab')
    check_apart(tmp_path / 'a', tmp_path / 'a')
    for first, second in ((tmp_path, tmp_path / 'x'), (tmp_path / 'x', tmp_path)):
        with pytest.raises(FileExistsError, match=r'x lies inside'):
            check_apart(first, second)
