"""Measures what pre-training is worth: GreenMIM, SimMIM and no pre-training on the demo's data.

A cell (say, the detector from GreenMIM's weights with 100 labels and seed 1) is one unit of work.
It goes on from its checkpoint if it was interrupted, and leaves one small file in docs/evidence.

Example:
    python tools/analysis/evidence.py status
    python tools/analysis/evidence.py run --hours 2
    python tools/analysis/evidence.py report
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

# Before torch: the study's minutes are those of one thread.
os.environ.setdefault('OMP_NUM_THREADS', '1')

from study.design import METHODS, STARTS, Cell, Study, StudyError, cells
from study.results import Busy, Places, read_result

from greenmim_mm.cli.errors import Parser, errors_in_one_line


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool; bad input ends it with exit code 2 and one line on stderr."""
    parser = Parser(
        description=__doc__.splitlines()[0],
        epilog='Missing cells are computed by "run", the most telling first; several of them may '
        'run at once, each takes cells that no other works at.',
    )
    parser.add_argument('--state', type=Path, help='folder of data and checkpoints')
    parser.add_argument('--results', type=Path, help='folder of the results')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    commands.add_parser('data', help='make the data')
    commands.add_parser('status', help='list the cells that are missing')
    commands.add_parser('report', help='write the tables and draw the figures')
    commands.add_parser('export', help='write the checkpoint that the demo starts from')
    run = commands.add_parser('run', help='compute the missing cells')
    run.add_argument('--hours', type=float, default=float('inf'), help='begin no cell after these')
    run.add_argument('--cells', default='', help='only those whose name contains this')
    for kind in ('pretrain', 'probe', 'detect'):
        command = commands.add_parser(kind, help=f'compute one cell of {kind}')
        starts = STARTS if kind == 'detect' else METHODS
        command.add_argument('--start', required=True, choices=starts)
        command.add_argument('--seed', type=int, default=0)
        command.add_argument(
            '--length', type=int, default=1, help="pre-training in units of the design's steps"
        )
        if kind == 'detect':
            command.add_argument('--labels', type=int, required=True)
            command.add_argument('--stretch', type=float, default=1.0)
        if kind != 'pretrain':
            command.add_argument(
                '--dev', action='store_true', help='development split only, write no result'
            )
    args = parser.parse_args(argv)
    given = {field.name: getattr(args, field.name) for field in fields(Places)}
    places = Places(**{name: path.resolve() for name, path in given.items() if path})
    study = Study()
    with errors_in_one_line(parser, StudyError, codes={Busy: 3}):
        if args.command in ('pretrain', 'probe', 'detect'):
            names = {field.name for field in fields(Cell)} & set(vars(args))
            cell = Cell(args.command, **{name: getattr(args, name) for name in names})
            _compute(study, places, cell, getattr(args, 'dev', False))
        elif args.command == 'data':
            from study.data import build_data

            print(build_data(study, places))
        elif args.command == 'export':
            from study.export import DEMO_CHECKPOINT, export

            print(f'{export(study, places)}  {DEMO_CHECKPOINT}')
        elif args.command == 'run':
            _run(study, places, args.hours, args.cells)
        elif args.command == 'status':
            _status(study, places)
        else:
            from study.pictures import draw_pictures
            from study.report import write_report

            print(write_report(study, places))
            for path in draw_pictures(study, places, places.results.parent / 'images'):
                print(path)


def _compute(study: Study, places: Places, cell: Cell, dev: bool) -> None:
    there = not dev and read_result(places, study, cell) is not None
    if cell.kind == 'pretrain':
        from study.pretrain import pretrain, weights_path

        # A result of another machine came without its weights.
        if not there or not weights_path(study, places, cell).exists():
            pretrain(study, places, cell)
            return
    if there:
        print(f'{cell.name}: already there')
    elif cell.kind == 'probe':
        from study.probe import probe

        probe(study, places, cell, 'dev' if dev else 'val')
    else:
        from study.detect import detect

        detect(study, places, cell, report=not dev)


def _run(study: Study, places: Places, hours: float, wanted: str) -> None:
    """One process a cell: mmengine keeps global state that a second runner would meet."""
    end = time.monotonic() + 3600 * hours
    for cell in cells(study):
        if wanted not in cell.name or read_result(places, study, cell) is not None:
            continue
        if time.monotonic() > end:
            break
        command = [sys.executable, __file__]
        command += [f'--state={places.state}', f'--results={places.results}', cell.kind]
        command += [f'--start={cell.start}', f'--seed={cell.seed}', f'--length={cell.length}']
        if cell.kind == 'detect':
            command += [f'--labels={cell.labels}', f'--stretch={cell.stretch:g}']
        print(f'{time.strftime("%H:%M:%S")} {cell.name}', flush=True)
        code = subprocess.run(command, check=False).returncode
        # 3: another process has it; 2: it stands on a cell that another process has.
        if code not in (0, 2, 3):
            raise StudyError(f'{cell.name} failed with exit code {code}; its output is above')


def _status(study: Study, places: Places) -> None:
    missing = [cell for cell in cells(study) if read_result(places, study, cell) is None]
    for cell in missing:
        print(f'missing: {cell.name}')
    total = sum(1 for _ in cells(study))
    print(f'{total - len(missing)} of {total} cells are there, in {places.results}')


if __name__ == '__main__':
    main()
