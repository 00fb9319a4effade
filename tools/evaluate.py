"""Evaluate a trained model: loss on token shards, perplexity of texts, accuracy on in-context tasks.

    python tools/evaluate.py runs/mine --shards data/mine/validation
    python tools/evaluate.py downloads/DCFormer-2.8B --text book.txt --context 2048 --stride 512
    python tools/evaluate.py models/mine --jsonl synthetic_dataset.jsonl --output results.json

The path is a run's folder (its newest complete checkpoint is used), a checkpoint, or any other folder that
tools/convert_checkpoint.py reads. --shards, --text and --jsonl may be given together.

  loss              nats/token, mean over the predicted tokens
  perplexity        exp(loss), per token: comparable between models with the same tokenizer only
  bits/byte         loss / ln 2 / (mean bytes of text per token): comparable between tokenizers
  token accuracy    fraction of the answers' tokens that are the most likely token, given all before them
  answer accuracy   fraction of the answers all of whose tokens are

For a checkpoint, --shards uses as many sequences as the run's validation.sequences, so that the loss on its validation
shards is the validation loss that the run logged; for other models, and with --sequences all, it uses all sequences.

--text takes a file as one document and predicts each of its tokens but the first (with --begin-id: all) once, in
windows of C = --context tokens that are S = --stride tokens apart: the first window predicts all of its tokens, each
further one its last S, from C - S + 1 tokens or more. --jsonl reads objects with task_id and texts, in which answers
are marked: "... a kind of [ fruit ]" (format: dcscale/evaluation/task_format.py). The same command on the same machine
gives the same numbers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dcscale.cli import add_model_options, check_output, usable_device, whole_number
from dcscale.files import write_json

# What imports torch is imported in the functions, after the arguments are parsed: it takes seconds.


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument(
        "--shards", action="extend", nargs="+", default=[], metavar="FOLDER", help="token shards, or their address"
    )
    parser.add_argument(
        "--text",
        action="extend",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="UTF-8 text, one document each",
    )
    parser.add_argument(
        "--jsonl", action="extend", nargs="+", type=Path, default=[], metavar="FILE", help="tasks with marked answers"
    )
    parser.add_argument(
        "--context",
        type=whole_number,
        metavar="TOKENS",
        help="tokens that the model sees at once: the sequence length of --shards, the window of --text, the longest "
        "text of --jsonl (default: the length it was trained with)",
    )
    parser.add_argument(
        "--stride", type=whole_number, metavar="TOKENS", help="for --text (default: half of the context)"
    )
    parser.add_argument(
        "--sequences",
        type=number_or_all,
        metavar="N|all",
        help="sequences from each --shards, spread evenly (default: validation.sequences of a run; else all)",
    )
    parser.add_argument(
        "--document-mask",
        action=argparse.BooleanOptionalAction,
        help="attention and targets of --shards stop at document boundaries (default: as trained)",
    )
    parser.add_argument(
        "--batch-size",
        type=whole_number,
        default=8,
        metavar="N",
        help="sequences, windows or texts per batch (default 8)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write the results here")
    return parser


def number_or_all(text: str) -> int | str:
    try:
        return text if text == "all" else whole_number(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or all") from error


def progress(name: str, unit: str) -> Callable[[int, int], None]:
    """A callback (done, total) that shows the progress of one file or folder on stderr."""
    from dcscale.observe import Progress, printable

    bars: list[Progress] = []

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(Progress(total, 0, unit, file=sys.stderr))
        bars[0].show(done, {"of": printable(name)})
        if done == total:
            bars[0].close()

    return show


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result as JSON. All input is opened before the model is loaded, so that its errors come at once."""
    from dcscale.evaluation import evaluate_shards, evaluate_tasks, evaluate_text, open_shards, read_tasks, read_text
    from dcscale.evaluation.loading import dtype_of, open_model
    from dcscale.evaluation.results import accuracy_rows

    trained = open_model(options)
    config, vocab_size = trained.config, trained.config.model.vocab_size
    context = options.context or config.data.sequence_length
    stride = options.stride or max(1, context // 2)
    mask = config.data.document_mask if options.document_mask is None else options.document_mask
    known = trained.conversion.state.get("tokenizer")
    streams = [
        open_shards(root, vocab_size=vocab_size, context=context, document_mask=mask, model_tokenizer=known)
        for root in options.shards
    ]
    shared = {"vocab_size": vocab_size, "context": context, "begin_id": options.begin_id}
    texts = [read_text(path, trained.tokenizer, stride=stride, **shared) for path in options.text]
    files = [(str(path), read_tasks(path, trained.tokenizer, **shared)) for path in options.jsonl]
    model = trained.load(options.device, dtype_of(options))
    size, many = options.batch_size, options.sequences or trained.validation_sequences
    many = None if many == "all" else many
    losses = [
        evaluate_shards(
            model, stream, batch_size=size, sequences=many, on_progress=progress(str(stream.storage), "sequence")
        )
        for stream in streams
    ]
    losses += [evaluate_text(model, text, batch_size=size, on_progress=progress(text.name, "token")) for text in texts]
    tasks = [
        (name, evaluate_tasks(model, samples, batch_size=size, on_progress=progress(name, "text")))
        for name, samples in files
    ]
    return {
        "path": str(options.path),
        "source": trained.description[0],
        "notes": trained.conversion.notes,
        "step": trained.step,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": str(options.device),
        "settings": {
            "context": context,
            "stride": stride,
            "sequences": many,
            "document_mask": mask,
            "batch_size": size,
            "tokenizer": options.tokenizer,
            "begin_id": options.begin_id,
        },
        "losses": [asdict(row) for row in losses],
        "accuracies": accuracy_rows(tasks),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argument_parser()
    options = parser.parse_args(arguments)
    if not (options.shards or options.text or options.jsonl):
        parser.error("name what to measure by --shards, --text or --jsonl")
    check_output(parser, options.output)
    options.device = usable_device(parser, options.device)
    from dcscale.evaluation.results import result_lines
    from dcscale.provenance import facts

    try:
        result = measure(options)
        print(*result_lines(result), sep="\n")
        if options.output is not None:
            write_json(options.output, {**facts(sys.argv, options.device.type), **result})
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
