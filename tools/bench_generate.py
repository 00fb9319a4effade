"""Compares the speed of text generation: dcscale's DCFormer, its Hugging Face export, and transformers' Llama.

    python tools/bench_generate.py                 # one thread of a CPU, 1 and 8 sequences: under three minutes
    python tools/bench_generate.py --rounds 15 --batch 1
    python tools/bench_generate.py --markdown tools/results/generate-amd-epyc.json

Also dcscale's baseline without compose. All have the same shape and random weights, and continue the same prompts
greedily in interleaved rounds. CPU time is compared, because other load of the machine changes it less than wall time.
If the export computes something else than dcscale, nothing is timed and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from dcscale.cli import check_output, print_tables, whole_number
from dcscale.files import write_json

# What imports torch is imported in the functions, after the arguments are parsed: it takes seconds.

RESULTS = Path(__file__).parent / "results"


def parse(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=whole_number, nargs="+", default=[1, 8], metavar="B", help="default: 1 8")
    parser.add_argument("--rounds", type=whole_number, default=7, help="timed calls of each kind (default 7)")
    parser.add_argument("--layers", type=whole_number, metavar="L", help="default 8")
    parser.add_argument("--dim", type=whole_number, metavar="E", help="default 256")
    parser.add_argument("--heads", type=whole_number, metavar="H", help="default 8")
    parser.add_argument("--ffn-dim", type=whole_number, metavar="F", help="default 704")
    parser.add_argument("--vocab-size", type=whole_number, metavar="V", help="default 4096")
    parser.add_argument("--prompt-tokens", type=whole_number, metavar="P", help="default 128")
    parser.add_argument("--new-tokens", type=whole_number, metavar="N", help="default 128")
    parser.add_argument("--threads", type=whole_number, default=1, help="of torch (default 1)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="default: tools/results/generate-PROCESSOR.json"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE.json", help="print a result's table, and exit")
    options = parser.parse_args(arguments)
    check_output(parser, options.output)
    return parser, options


def main(arguments: list[str] | None = None) -> int:
    parser, options = parse(arguments)
    import torch

    from dcscale.bench import generate
    from dcscale.provenance import facts, slug

    if options.markdown is not None:
        print_tables(parser, options.markdown, generate.markdown)
        return 0
    torch.set_num_threads(options.threads)
    given = {name: getattr(options, name) for name in generate.Shape._fields}
    shape = generate.Shape(**{name: value for name, value in given.items() if value is not None})
    say = partial(print, flush=True)
    started = time.monotonic()
    command = ["python", "tools/bench_generate.py", *(sys.argv[1:] if arguments is None else arguments)]
    result = facts(command, "cpu", ("transformers",))
    if result["versions"]["transformers"] is None:
        parser.error("transformers is not installed: pip install 'dcscale[hf]'")
    say(f"{result['machine']['name']}, {options.threads} threads, load {result['machine']['load_average']}")
    try:
        runs = generate.make_kinds(shape)
    except generate.WrongResultsError as error:
        print(error, file=sys.stderr)
        return 1
    rows = generate.measure(runs, options.batch, options.rounds, shape, say)
    result |= {"shape": shape._asdict(), "rows": rows, "targets": generate.judge(rows)}
    result["seconds"] = round(time.monotonic() - started)
    say(generate.markdown(result))
    path = options.output or RESULTS / f"generate-{slug('cpu')}.json"
    write_json(path, result)
    say(f"written to {path} after {result['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
