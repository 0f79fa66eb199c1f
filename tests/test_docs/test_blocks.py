"""Code in README, docs and READMEs of recipes: run as it stands, or parsed.

A block runs, in a folder with small checkpoints of the names that pages use. One that needs what a
test has not, a GPU, data or hours, begins with a comment, ``<!-- needs: a GPU -->``: its commands
are then parsed by the very parsers that they would meet, and its Python is compiled.
"""

import argparse
import os
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from mmengine.utils import get_installed_path
from tiny_swins import pretrained_file, pretrained_weights

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / 'README.md', *sorted(ROOT.glob('docs/**/*.md'))]
PAGES += sorted(ROOT.glob('configs/*/README.md'))
BLOCK = re.compile(r'(?:^<!-- needs: (.+?) -->\n)?^ *```(\w*)\n(.*?)^ *```$', re.M | re.S)
SHELL, PYTHON, NO_CODE = ('bash', 'shell'), ('python',), ('', 'text', 'bibtex')


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    needs: str | None
    language: str
    code: str

    @property
    def commands(self) -> list[list[str]]:
        lines = self.code.replace('\\\n', ' ').splitlines()
        # Options that a synopsis has in brackets are options.
        parts = (shlex.split(re.sub(r'\[(--.*?)\]', r'\1', line), comments=True) for line in lines)
        return [part for part in parts if part]


def blocks_of(path: Path) -> list[Block]:
    text, page = path.read_text(encoding='utf-8'), str(path.relative_to(ROOT))
    return [
        Block(page, text.count('\n', 0, match.start(2)) + 1, *match.groups())
        for match in BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def named(blocks: list[Block]) -> dict:
    return dict(argvalues=blocks, ids=[f'{block.page}:{block.line}' for block in blocks])


def chosen(languages: tuple[str, ...], run: bool) -> list[Block]:
    return [b for b in BLOCKS if b.language in languages and (b.needs is None) == run]


class Parsed(BaseException):
    """Arguments were taken; what would be done with them is not."""


@pytest.fixture
def parsing(monkeypatch):
    """Has every argparse parser stop once it has taken its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', stop)


def play(arguments: list[str], monkeypatch) -> None:
    """Run a command of the package in this process; anything but success is an error."""
    program, *rest = arguments
    if program == 'greenmim':
        from greenmim_mm.cli.main import main

        call = lambda: main(rest)  # noqa: E731
    else:
        script = ROOT / program
        assert script.is_file(), f'{program} does not exist'
        monkeypatch.setattr(sys, 'argv', [str(script), *rest])
        # As Python does for a script: modules beside it can be imported.
        monkeypatch.syspath_prepend(str(script.parent))
        call = lambda: runpy.run_path(str(script), run_name='__main__')  # noqa: E731
    try:
        call()
    except SystemExit as end:
        assert end.code in (0, None), f'{" ".join(arguments)} ended with {end.code}'


def check_parts(arguments: list[str]) -> None:
    """Recipes that are named exist, and so do extras."""
    for argument in arguments:
        if re.fullmatch(r'configs/[\w./-]+\.py', argument) and 'RECIPE' not in argument:
            assert (ROOT / argument).is_file(), f'{argument} does not exist'
        for extra in re.findall(r'greenmim-mm\[(\w+)\]', argument):
            assert (ROOT / f'requirements/{extra}.txt').is_file(), f'there is no extra {extra}'


def script_of(arguments: list[str]) -> list[str] | None:
    """The command as ``play`` takes it; None for one that is not the package's."""
    while re.fullmatch(r'\w+=\S*', arguments[0]):
        arguments = arguments[1:]
    program, *rest = arguments
    if program in ('python', '.venv/bin/python') and rest[0].endswith('.py'):
        return rest
    if program in ('greenmim', '.venv/bin/greenmim'):
        return ['greenmim', *rest]
    if program in ('torchrun', 'srun'):
        first = next(i for i, word in enumerate(rest) if word in ('greenmim', 'greenmim_mm'))
        return ['greenmim', *rest[first + 1 :]]
    if program == 'bash':
        return tool_of(*rest)
    return None


def tool_of(launcher: str, *words: str) -> list[str]:
    """The command that a launcher starts on every GPU; how many is one of its own words."""
    script = ROOT / launcher
    assert script.is_file(), f'{launcher} does not exist'
    usage = re.search(r'usage: \$0 (.+?) \[options', script.read_text())[1].split()
    given = dict(zip(usage, words, strict=False))
    assert given.get('GPUS', '8').isdigit(), f'{launcher} takes {usage}'
    tool = re.search(r'(\w+\.py)"', script.read_text())[1]
    places = [given[name] for name in ('CONFIG', 'CHECKPOINT') if name in given]
    return [f'tools/{tool}', *places, *words[len(usage) :]]


def check_foreign(arguments: list[str]) -> None:
    """A command of another program: what it names of this project must exist."""
    words = [word for word in arguments if not re.fullmatch(r'[A-Z_]+=.*', word)]
    if words[0] == 'make':
        targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.M)
        assert set(words[1:]) <= set(targets), f'make has no {words[1:]}'
    elif words[0] == 'mim':
        kind, package, name = words[1:4]
        assert package == 'greenmim_mm' and kind in ('train', 'test', 'run')
        pattern = f'tools/**/{name}.py' if kind == 'run' else f'configs/*/{name}'
        assert len(list(ROOT.glob(pattern))) == 1, f'mim {kind} would not find {name}'
    else:
        assert words[0] == 'pip' or words[:3] == ['python', '-m', 'pip'], f'what is {words[0]}?'


def test_languages_are_known():
    for block in BLOCKS:
        assert block.language in SHELL + PYTHON + NO_CODE, (block.page, block.line)
        assert block.needs is None or block.language not in NO_CODE, (block.page, block.line)
    # Else the tests below would find nothing and pass.
    assert min(len(chosen(kind, run)) for kind in (SHELL, PYTHON) for run in (True, False)) >= 3


@pytest.mark.parametrize('block', **named(chosen(SHELL, False)))
def test_commands_parse(block, parsing, monkeypatch):
    for arguments in block.commands:
        check_parts(arguments)
        arguments = [{'FORMAT': 'mmdet'}.get(word, word) for word in arguments]
        if (script := script_of(arguments)) is None:
            check_foreign(arguments)
            continue
        with pytest.raises(Parsed):
            play(script, monkeypatch)


@pytest.mark.parametrize('block', **named(chosen(PYTHON, False)))
def test_python_compiles(block):
    compile(block.code, f'{block.page}:{block.line}', 'exec')


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """A tiny checkpoint under each name that pages use."""
    from greenmim_mm.checkpoint import convert_file, convert_state_dict

    folder = tmp_path_factory.mktemp('checkpoints')
    path = pretrained_file(folder, 'epoch_200.pth')
    content = torch.load(path)
    torch.save({**content, 'ema_state_dict': content['state_dict']}, path)
    convert_file(path, folder / 'simmim_pretrain.pth', 'microsoft')
    convert_file(path, folder / 'authors.pth', 'greenmim')
    convert_file(path, folder / 'timm_swin.safetensors', 'timm')
    windows = dict(window_size=(24, 24, 24, 12), pretrained_window_sizes=(12, 12, 12, 6))
    torch.save(
        convert_state_dict(pretrained_weights(2, **windows), 'greenmim_mm', 'timm'),
        folder / 'swinv2_window12to24.pth',
    )
    return folder


@pytest.fixture
def here(checkpoints, tmp_path, monkeypatch):
    """An empty folder but for the checkpoints, to be in."""
    for path in checkpoints.iterdir():
        os.link(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize('block', **named(chosen(SHELL, True)))
def test_commands_run(block, here, monkeypatch):
    for arguments in block.commands:
        check_parts(arguments)
        script = script_of(arguments)
        assert script is not None, f'{arguments[0]} is not run: say what it needs'
        play(script, monkeypatch)


@pytest.mark.parametrize('block', **named(chosen(PYTHON, True)))
def test_python_runs(block, here):
    # mmengine 0.10.7 looks for packages beside their metadata, where an editable one is not.
    if "'greenmim_mm::" in block.code and not Path(get_installed_path('greenmim_mm')).is_dir():
        pytest.skip('this mmengine finds recipes by name in an installed wheel alone')
    names: dict = {}
    exec(compile(block.code, f'{block.page}:{block.line}', 'exec'), names)
    # A piece of a config: what it describes can be built.
    if isinstance(names.get('model'), dict):
        from mmengine.registry import MODELS

        backbone = dict(names['model']['backbone'])
        assert 'init_cfg' in backbone
        backbone.pop('init_cfg')
        MODELS.build(backbone)
