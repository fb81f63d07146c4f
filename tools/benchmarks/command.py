"""The command line of tools/bench."""

import argparse
import json
import os
import subprocess
import sys

from . import bench as running
from . import machine, plywood, report, shell
from .results import from_document, merged, to_document

GROUPS = {
    "block": "Block level",
    "files": "File level",
    "life": "Life cycle",
    "space": "Space, memory and CPU",
    "engine": "Inside the engine",
}


IN_NAMESPACE = "PLYWOOD_BENCH_NAMESPACE"


def load_cases():
    """Imports every module that registers cases."""
    from . import block, containerd, durability, engine, files, life, memory, space  # noqa: F401  pylint: disable=unused-import
    return sorted(running.CASES, key=lambda case: list(GROUPS).index(case.group))


def chosen(cases, only):
    """The cases of groups, or single ones, that were named."""
    if not only:
        return cases
    wanted = only.split(",")
    found = [case for case in cases if case.group in wanted or case.key in wanted]
    unknown = [name for name in wanted if not any(name in (case.group, case.key) for case in cases)]
    if unknown:
        raise SystemExit(f"bench: there is no {', '.join(unknown)}; --list prints the cases")
    return found


def arguments(root):
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="tools/bench", description="Measures plywood and its peers side by side, and writes docs/benchmarks.")
    parser.add_argument("--out", default=os.path.join(root, "docs/benchmarks"), help="where page, plots and raw numbers go")
    parser.add_argument("--dir", default="/var/tmp", help="a directory on the host file system to measure on")
    parser.add_argument("--only", metavar="NAME,..", help="groups or cases; what is not run again stays as it was in --out")
    parser.add_argument("--rounds", type=int, default=5, help="of each case; at least 5 for figures that count")
    parser.add_argument("--quick", action="store_true", help="small sizes and short runs, to try the cases: no results")
    parser.add_argument("--list", action="store_true", help="print the cases")
    parser.add_argument("--report", action="store_true", help="measure nothing: write page and plots anew from the raw numbers")
    parser.add_argument("--program", metavar="FILE", help="measure this plywood instead of building one")
    parser.add_argument("--no-setup", action="store_true", help="install nothing; what is missing is shown as not run")
    return parser.parse_args()


def enter_own_mount_namespace():
    """Starts again in a mount namespace of its own: whoever enters another meanwhile would take copies of our mounts with him, and keep
    their devices busy. They also go with us, whatever ends us."""
    if os.environ.get(IN_NAMESPACE) != "1":
        os.environ[IN_NAMESPACE] = "1"
        words = ["unshare", "--mount", "--propagation", "private", "--", sys.executable, *sys.argv]
        os.execvp(words[0], words)


def main():
    """tools/bench."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    given = arguments(root)
    raw = os.path.join(given.out, "results.json")
    if given.report:
        with open(raw, encoding="utf-8") as file:
            report.write(given.out, *from_document(json.load(file)), GROUPS)
        return 0
    cases = chosen(load_cases(), given.only)
    if given.list:
        for case in cases:
            print(f"{case.key:24} about {case.minutes:4.0f} min  {case.title}")
        print(f"{'':24} about {sum(case.minutes for case in cases):4.0f} min  in all")
        return 0
    if os.geteuid() != 0:
        print("bench: it makes loop devices and mounts; run as root", file=sys.stderr)
        return 1
    enter_own_mount_namespace()
    shell.end_by_exception()
    if not given.no_setup:
        subprocess.run([os.path.join(root, "tools/setup"), "bench"], check=True)
    program = plywood.program(root, given.program)
    bench = running.Bench(root, program, os.path.realpath(given.dir), given.rounds, given.quick)
    former, settings = [], {}
    if os.path.exists(raw) and given.only:
        with open(raw, encoding="utf-8") as file:
            former, old = from_document(json.load(file))
        settings = old.get("settings", {})
    try:
        about = machine.about(root, program, given.dir, given.rounds, given.quick)

        def keep():
            """After each case, so that what is stopped leaves what it has measured."""
            about["settings"] = {**settings, **bench.settings}
            for row in bench.rows:
                row.measured = row.measured or f"{machine.now()}, {about['plywood']}"
            write_results(given.out, raw, merged(former, bench.rows), about)

        bench.run(cases, keep)
    except KeyboardInterrupt:
        bench.say("stopped; undoing what was set up")
        return 130
    finally:
        bench.stack.close()
    print(f"bench: {os.path.join(given.out, 'README.md')}")
    return 0


def write_results(directory, raw, rows, about):
    """Raw numbers, page and plots."""
    os.makedirs(directory, exist_ok=True)
    with open(raw + ".new", "w", encoding="utf-8") as file:
        json.dump(to_document(rows, about), file, indent=1)
        file.write("\n")
    os.replace(raw + ".new", raw)
    report.write(directory, rows, about, GROUPS)
