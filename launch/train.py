"""Train a DCFormer or its Transformer baseline.

    deepspeed launch/train.py CONFIG.yaml [MORE.yaml ...] [key=value ...]
    torchrun --nproc-per-node N launch/train.py ...
    srun python launch/train.py ...          (one task a GPU)
    python launch/train.py ...               (one process)

YAML files are merged in order, later wins, then key=value. `python tools/check_config.py --reference` lists
every key; `python tools/check_config.py CONFIG.yaml ...` finds what would keep a run from starting.

Exit code: 0 done, 1 an error of the program, 2 settings, data or checkpoint do not fit, 3 training diverged,
75 stopped on request (the same command resumes), 76 a rank, worker, disk or network was lost or hangs (the same
command resumes), 130 interrupted by Ctrl-C before training or twice. RUN/ending.json says the same with the reason;
torchrun turns every code but 0 into 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import os

from dcscale.cluster.ending import Ending, ExitCode


def main(arguments: list[str] | None = None, ending: Ending | None = None) -> None:
    ending = ending or Ending()
    faulthandler.enable(2)  # a crash in C, such as gloo's if collectives do not match, shows the stacks
    with ending.signals:  # first of all, since a batch system may send one at any time
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("settings", nargs="*", metavar="CONFIG.yaml|key=value", help="settings, in order")
        parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
        options, unknown = parser.parse_known_args(arguments)
        if not options.settings and not unknown:
            parser.error("give a config, such as configs/quickstart.yaml")
        train([*options.settings, *unknown], ending)


def train(settings: list[str], ending: Ending) -> None:
    """Trains with these config files and ``key=value`` overrides, and ends the process."""
    # torch's own warnings about each lost connection have 20 lines of C++ backtrace; it reads this when imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Imported after the arguments are parsed: this takes seconds.
    from dcscale.cluster.failures import Failures
    from dcscale.config import check_config, load_arguments, raise_problems
    from dcscale.observe import Console
    from dcscale.parallel import discover, share_cores, start_distributed, stop_distributed
    from dcscale.train import REFUSALS, StopReason, build_trainer, summary_lines, write_summary

    with Failures(ending, REFUSALS):
        environment = discover()
        ending.know(environment)
        console = Console(enabled=environment.is_main)
        loaded = load_arguments(settings)
        config = loaded.config
        raise_problems(check_config(config, environment.world_size), loaded.origins)
        share_cores(environment)
        start_distributed(environment, config.parallel.start_timeout_minutes, config)
        trainer = build_trainer(config, environment, console, ending)
        stop_reason = trainer.fit(ending.signals)
        summary = write_summary(trainer, stop_reason)
        resumes = stop_reason in (StopReason.SIGNAL, StopReason.TIME_LIMIT)
        ending.decide(ExitCode.RESUME if resumes else ExitCode.DONE, stop_reason.value, agreed=True)
        trainer.close()
        console.line(f"ended      {stop_reason.value}")
        for line in summary_lines(summary):
            console.line(line)
        console.line(f"files      {trainer.run}; curves: tensorboard --logdir {trainer.run}")
        if not trainer.engine.barrier():
            console.line("warning    not all ranks arrived at the end; the last checkpoint is complete")
        stop_distributed()
    ending.exit()


if __name__ == "__main__":
    main()
