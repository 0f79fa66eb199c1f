"""Runs the demo: pre-train with GreenMIM, detect with Mask R-CNN, report what came out.

Example:
    greenmim demo --quick --model swinv2
"""

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .errors import EXIT_INTERRUPTED, Parser
from .recipes import is_clone, recipe_folder


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the demo; a failed step ends it with exit code 1, bad input with 2."""
    parser = Parser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='the same road, on very little data')
    parser.add_argument(
        '--model', choices=('swin', 'swinv2'), default='swin', help='network (default: swin)'
    )
    parser.add_argument('--fresh', action='store_true', help='forget what earlier calls have done')
    args = parser.parse_args(argv)

    from ..demo.report import write_report
    from ..demo.road import FULL, QUICK, run_road
    from ..demo.running import StepError

    scale = (QUICK if args.quick else FULL).with_model(args.model)
    # Tools and configs lie side by side, in a clone as in an installed package.
    root = recipe_folder().parent
    if not is_clone():
        scale = replace(scale, folder=str(Path.cwd() / scale.folder))
        if shlex.quote(scale.folder) != scale.folder:
            parser.error(f'{scale.folder}: run it in a folder whose name needs no quotes')
    if args.fresh:
        shutil.rmtree(root / scale.folder, ignore_errors=True)
    try:
        outcomes = run_road(scale, lambda line: print(line, flush=True), root)
    except StepError as error:
        parser.exit(1, f'{parser.prog}: {error}\n')
    except KeyboardInterrupt:
        told = f'\n{parser.prog}: interrupted; the same command goes on from here\n'
        parser.exit(EXIT_INTERRUPTED, told)
    report = write_report(scale, outcomes, root)
    table = [line for line in report.read_text(encoding='utf-8').splitlines() if '|' in line][:4]
    print('\n'.join(table))
    print(f'report: {report.relative_to(root) if report.is_relative_to(root) else report}')
