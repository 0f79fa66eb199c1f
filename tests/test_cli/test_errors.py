"""The one shell for errors: what becomes a line, with which code, and what stays a traceback."""

import pytest

from greenmim_mm.cli.errors import Parser, UserError, errors_in_one_line, one_line

PARSER = Parser(prog='tool')


def ended(capsys, error, *expected, codes=None):
    with pytest.raises(SystemExit) as exit_info, errors_in_one_line(PARSER, *expected, codes=codes):
        raise error
    return exit_info.value.code, capsys.readouterr().err


def test_errors_of_users(capsys):
    assert ended(capsys, UserError('no such thing')) == (2, 'tool: error: no such thing\n')
    assert ended(capsys, FileExistsError('x.png exists'), OSError)[1].endswith('x.png exists\n')
    assert ended(capsys, ImportError(), ImportError)[1] == 'tool: error: ImportError\n'


def test_codes_belong_to_kinds(capsys):
    codes = {ArithmeticError: 1}
    assert ended(capsys, ZeroDivisionError('by 0'), codes=codes) == (1, 'tool: error: by 0\n')
    assert ended(capsys, UserError('x'), codes=codes)[0] == 2


def test_interrupt(capsys):
    assert ended(capsys, KeyboardInterrupt()) == (130, 'tool: interrupted\n')


def test_other_errors_keep_their_traceback():
    with pytest.raises(ValueError, match='a mistake of ours'), errors_in_one_line(PARSER, OSError):
        raise ValueError('a mistake of ours')


def test_bad_option_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit_info:
        PARSER.parse_args(['--nothing'])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == 'tool: error: unrecognized arguments: --nothing\n'


@pytest.mark.parametrize(
    ('text', 'line'),
    [
        ('two\n  lines', 'two lines'),
        ('a\x1b[2Jb\x00', 'a\\x1b[2Jb\\x00'),
        ('x' * 30, 'x' * 20 + ' ...'),
        ('Caught ValueError in worker 0.\nOriginal Traceback:\nm.ValueError: a: b', 'a: b'),
        ('Caught red-handed', 'Caught red-handed'),
    ],
)
def test_one_line(text, line):
    assert one_line(text, 20) == line
