"""Runs the demo: pre-train with GreenMIM, detect with Mask R-CNN, report what came out.

Example:
    python tools/demo.py --quick --model swinv2
"""

import shutil
from collections.abc import Sequence

from greenmim_mm.cli.errors import Parser
from greenmim_mm.demo.report import write_report
from greenmim_mm.demo.road import FULL, NETWORKS, QUICK, ROOT, run_road
from greenmim_mm.demo.running import StepError


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool; a failed step ends it with exit code 1, bad input with 2."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='the same road, on very little data')
    parser.add_argument(
        '--model', choices=tuple(NETWORKS), default='swin', help='network (default: swin)'
    )
    parser.add_argument('--fresh', action='store_true', help='forget what earlier calls have done')
    args = parser.parse_args(argv)
    scale = (QUICK if args.quick else FULL).with_model(args.model)
    if args.fresh:
        shutil.rmtree(ROOT / scale.folder, ignore_errors=True)
    try:
        outcomes = run_road(scale, lambda line: print(line, flush=True))
    except StepError as error:
        parser.exit(1, f'{parser.prog}: {error}\n')
    except KeyboardInterrupt:
        parser.exit(130, f'\n{parser.prog}: interrupted; the same command goes on from here\n')
    report = write_report(scale, outcomes, ROOT)
    table = [line for line in report.read_text(encoding='utf-8').splitlines() if '|' in line][:4]
    print('\n'.join(table))
    print(f'report: {report.relative_to(ROOT)}')


if __name__ == '__main__':
    main()
