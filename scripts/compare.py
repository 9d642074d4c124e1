"""Compares runs: python scripts/compare.py SWEEP_OR_RUNS...

Writes report.html, report.md and their pictures, and prints a table. No account, no network.
"""

import rlhf_exp.machine.environment  # noqa: F401, I001  first: it must precede the import of matplotlib

import argparse
from datetime import datetime
from pathlib import Path

from rich.console import Console

from rlhf_exp.report.figures import write_figures
from rlhf_exp.report.markdown import write_markdown
from rlhf_exp.report.page import write_page
from rlhf_exp.report.payload import Names, build_payload
from rlhf_exp.report.terminal import print_report
from rlhf_exp.machine.streams import make_streams_unbreakable


def main() -> None:
    """Reads the arguments, writes the report, prints a summary."""
    make_streams_unbreakable()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="+", type=Path, help="runs, sweeps, or folders of them")
    parser.add_argument("--out", type=Path, help="folder (report in the one path, else ./report)")
    parser.add_argument("--score", default=Names.score, help=f"metric to raise ({Names.score})")
    parser.add_argument(
        "--kl", help="metric to keep low (eval/kl; eval/kl_sum with best_of_n or a limit)"
    )
    parser.add_argument("--wandb", action="store_true", help="add the figures to the sweep in W&B")
    parser.add_argument("--no-html", action="store_true", help="only Markdown and pictures")
    arguments = parser.parse_args()
    paths = arguments.paths
    if arguments.wandb and len(paths) > 1:
        parser.error("--wandb adds the report to one sweep: give one folder")
    out = arguments.out or (paths[0] / "report" if len(paths) == 1 else Path("report"))
    names = Names(score=arguments.score, kl=arguments.kl)
    payload = build_payload(paths, names, made=datetime.now())
    if not payload["runs"]:
        parser.exit(2, "\n".join([*payload["problems"], "nothing to report: no run was found\n"]))
    try:
        pictures = write_figures(payload, out)
        report_files = [write_markdown(payload, pictures, out / "report.md")]
        page = None if arguments.no_html else write_page(payload, out / "report.html")
        report_files += [page] if page else []
    except OSError as error:
        parser.exit(2, f"error: cannot write {error.filename}: {error.strerror}; set --out\n")
    print_report(payload, Console())
    for path in report_files:
        print(path)
    if arguments.wandb:
        from rlhf_exp.report.wandb_report import log_report  # imports torch

        log_report(paths[0], pictures, page=page)


if __name__ == "__main__":
    main()
